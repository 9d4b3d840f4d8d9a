"""The detokenizer: what it streams is the text, whole characters only, and never a stop string."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.utils.hub import resolve_model

TEXTS = [
    "The quick brown fox jumps over 1234 lazy dogs.\n\n\tdef f(x):  return x",
    "你好,世界!今天天气很好。龘靐齉",
    "Family 👩‍👩‍👧‍👦, flags 🇫🇷🏴‍☠️, skin 👍🏽, e\u0301 ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "  leading spaces, and trailing ones  ",
]


@pytest.fixture(scope="module")
def smollm():
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    return PreTrainedTokenizerFast.from_pretrained(resolve_model(None))


@pytest.fixture(scope="module")
def sentencepiece():
    """The decoder of Llama 2: ▁ for a space, the first one dropped, unknown characters as runs of bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "▁a",
        "n",
        "▁▁",
        "é",
        "�",
    ]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in pieces[:3]])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def letters():
    """One token per byte, so that a test decides where the tokens begin."""
    alphabet = {chr(byte): byte for byte in range(33, 127)}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def decode(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokenizer, token_ids, stop=()):
    """The pieces that come out token by token, the last one from `finish`; and the detokenizer."""
    detokenizer = Detokenizer(tokenizer, list(stop))
    pieces = [detokenizer.append([token_id]) for token_id in token_ids]
    return [*pieces, detokenizer.finish()], detokenizer


def check_stream(tokenizer, token_ids):
    pieces, detokenizer = stream(tokenizer, token_ids)
    assert "".join(pieces) == detokenizer.text == decode(tokenizer, token_ids), token_ids


# Text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_shows_whole_characters_and_all_of_them(smollm, text):
    pieces, detokenizer = stream(smollm, smollm.encode(text))
    assert "".join(pieces) == detokenizer.text == text
    assert "�" not in "".join(pieces)


def test_text_is_not_held_back_without_need(smollm):
    token_ids = smollm.encode(TEXTS[0])
    pieces, _ = stream(smollm, token_ids)
    assert pieces == [smollm.decode([token_id]) for token_id in token_ids] + [""]


def test_random_tokens_give_the_text_of_decode(smollm):
    rng = random.Random(0)
    everything = range(len(smollm) + 50)  # with special tokens and ids that the tokenizer does not know
    broken = [i for i in everything if "�" in smollm.decode([i])]
    assert len(broken) > 100
    for _ in range(1500):
        pool = rng.choice([everything, broken, broken + [0, 1, 2, 33, 60000], rng.sample(broken, 8)])
        check_stream(smollm, rng.choices(pool, k=rng.randint(0, 60)))


def test_random_tokens_give_the_text_of_decode_with_sentencepiece(sentencepiece):
    rng = random.Random(0)
    special, byte, pieces = range(3), range(3, 259), range(259, len(sentencepiece) + 2)
    valid = [3 + byte for byte in "你👩é".encode()]
    for _ in range(1500):
        pool = [*rng.choice([pieces, byte, valid, range(len(sentencepiece))]), *special, *pieces]
        check_stream(sentencepiece, rng.choices(pool, k=rng.randint(0, 40)))


def test_sentencepiece_keeps_the_spaces_between_words(sentencepiece):
    the, eos, unknown = sentencepiece.convert_tokens_to_ids(["▁the", "</s>", "▁"])
    assert stream(sentencepiece, [the, the, eos, the, unknown, the])[0] == ["the", " the", "", " the", " ", " the", ""]


def test_sentencepiece_shows_a_rare_character_when_its_bytes_are_over(sentencepiece):
    n = sentencepiece.convert_tokens_to_ids("n")
    token_ids = [n, *(3 + byte for byte in "你好".encode()), n]
    assert stream(sentencepiece, token_ids)[0] == ["n", "", "", "", "", "", "", "你好n", ""]


def test_special_tokens_are_left_out(smollm):
    end = smollm.eos_token_id
    assert stream(smollm, [end, *smollm.encode("Hello"), end, end])[0] == ["", "Hello", "", "", ""]


def test_an_unfinished_character_comes_out_at_the_end(smollm):
    token_ids = smollm.encode("Hi 👩")[:-1]
    pieces, detokenizer = stream(smollm, token_ids)
    assert "�" not in "".join(pieces[:-1]) and pieces[-1] == "�"
    assert detokenizer.finish() == ""  # nothing comes twice


def test_tokens_may_come_several_at_a_time(smollm):
    token_ids = smollm.encode(TEXTS[2])
    detokenizer = Detokenizer(smollm, ["!"])
    pieces = [detokenizer.append(token_ids[i : i + 5]) for i in range(0, len(token_ids), 5)] + [detokenizer.finish()]
    assert "".join(pieces) == TEXTS[2]


def test_the_work_per_token_does_not_grow_with_the_text(smollm, monkeypatch):
    decoded = []

    def count(self, token_ids, **options):
        decoded.append(len(token_ids))
        return original(self, token_ids, **options)

    original = type(smollm).decode
    monkeypatch.setattr(type(smollm), "decode", count)
    broken = smollm.encode("龘")[:1]
    token_ids = smollm.encode(TEXTS[2]) * 20 + broken * 500 + [smollm.eos_token_id] * 500
    stream(smollm, token_ids)
    assert max(decoded) <= 5 and len(decoded) <= 2 * len(token_ids) + 1


# Stop strings


def stream_letters(letters, text, stop):
    return stream(letters, [ord(letter) for letter in text], stop)


@pytest.mark.parametrize(
    "text, stop, pieces, stopped",
    [
        ("abXYcd", ["XY"], ["a", "b", "", "", "", "", ""], True),  # begins in one token, ends in the next
        ("abXcd", ["XY"], ["a", "b", "", "Xc", "d", ""], False),  # a false start is let go
        ("abX", ["XY"], ["a", "b", "", "X"], False),  # and so it is at the end
        ("aXXYb", ["XY"], ["a", "", "X", "", "", ""], True),  # a false start right before the real one
        ("ababac", ["abac"], ["", "", "", "ab", "", "", ""], True),  # and so is one that overlaps with it
        ("abc", ["a"], ["", "", "", ""], True),  # nothing is left
        ("xabc", ["xabcd", "ab"], ["", "", "x", "", ""], True),  # the one that is complete first counts: "ab"
        ("abc", ["bc", "abc"], ["", "", "", ""], True),  # two complete at once: the longer one
    ],
)
def test_stop_strings(letters, text, stop, pieces, stopped):
    got, detokenizer = stream_letters(letters, text, stop)
    assert got == pieces and detokenizer.stopped is stopped and detokenizer.text == "".join(pieces)


def expected_release(text, stop):
    """What may be shown of `text`, found the slow way, and whether it holds a stop string."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    held = max(n for n in range(len(text) + 1) if n == 0 or any(s.startswith(text[-n:]) for s in stop))
    return text[: len(text) - held], False


def test_random_stop_strings_are_cut_out_however_the_text_is_cut_into_tokens(letters):
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(1, 20)))
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))]
        detokenizer = Detokenizer(letters, stop)
        end = 0
        while end < len(text):
            start, end = end, end + rng.randint(1, 4)
            detokenizer.append([ord(letter) for letter in text[start:end]])
            assert (detokenizer.text, detokenizer.stopped) == expected_release(text[:end], stop), (text, stop)
        detokenizer.finish()
        assert detokenizer.text == (expected_release(text, stop)[0] if detokenizer.stopped else text)
        num_stopped += detokenizer.stopped
    assert 500 < num_stopped < 1900


def test_a_stop_string_may_be_cut_anywhere_by_tokens(smollm):
    text = "Hello, 世界! End.<END>more"
    for stop in ("世界", "界!", "<END>", "d.<"):
        pieces, detokenizer = stream(smollm, smollm.encode(text), [stop])
        assert "".join(pieces) == detokenizer.text == text.partition(stop)[0] and detokenizer.stopped


def test_nothing_comes_after_a_stop_string(letters):
    detokenizer = Detokenizer(letters, ["b"])
    assert [detokenizer.append(map(ord, "abc")), detokenizer.append(map(ord, "def")), detokenizer.finish()] == [
        "a",
        "",
        "",
    ]
    assert detokenizer.text == "a" and detokenizer.stopped


def test_special_tokens_are_no_stop_strings(smollm):
    """They are not in the text; `stop_token_ids` is for them."""
    _, detokenizer = stream(smollm, smollm.encode("a<|im_end|>b"), ["<|im_end|>"])
    assert detokenizer.text == "ab" and not detokenizer.stopped
