"""The running example: the same four requests, with the same letters and colours, in every chapter."""

OPENING = "You are a patient teacher. You answer every question in one short sentence.\n\n"
"""What A and B begin with. In the default model's tokens it is a block of 16, and one more line break."""

PROMPTS = {
    "A": OPENING + "Question: What is a cat?\nAnswer:",  # 27 tokens
    "B": OPENING + "Question: What is a computer?\nAnswer:",  # 27 tokens
    "C": (  # 40 tokens
        "It was the first day of winter. Snow had fallen all night, and the whole village lay under a thick white "
        "blanket. The children put on their warm coats, ran out into the garden, and"
    ),
    "D": "The capital of France is",  # 5 tokens
}
