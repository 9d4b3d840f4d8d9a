"""From token ids to text, while it grows.

Tokens are not characters. A character such as 你 or 👩 may be spread over several tokens, so the last ones may stand for
half a character; a stop string may begin in one token and end in another. A stream must not show what it would have to
take back. The detokenizer therefore hands out text only once nothing that may follow can change it.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes incomplete or invalid UTF-8 to


class Detokenizer:
    """The text of one request.

    Text comes out in pieces, from `append` and at the end from `finish`; `text` is all of them joined. It equals
    `tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)` of all token ids, up to
    the first stop string. Whether one was found is told by `stopped`. If several are found, the one that is complete
    first counts, so that the text does not depend on how it was cut into tokens.

    Special tokens give no text. A token from `stop_token_ids` may be an ordinary one: do not append it.

    The time per token does not grow with the text, since only the last few tokens are decoded (the idea is that of
    Hugging Face's text-generation-inference and of vLLM).
    """

    __slots__ = ("text", "stopped", "_tokenizer", "_stop", "_special", "_window", "_num_shown", "_held")

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer: Any = tokenizer  # whose type hints say `str | list[str]` where it returns the first
        self._stop = stop
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []  # the last tokens
        self._num_shown = 0  # how many characters of the window's text have been handed on
        self._held = ""  # text that may turn out to be the beginning of a stop string

    def append(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is now certain, which is often none."""
        return self._release("".join(map(self._decode, token_ids)))

    def finish(self) -> str:
        """Return the rest of the text, half characters included: no more tokens will come."""
        rest = self._release(self._window_text()[self._num_shown :])
        self.text += self._held
        rest, self._held, self._window, self._num_shown = rest + self._held, "", [], 0
        return rest

    def _decode(self, token_id: int) -> str:
        """The text that the next token makes certain."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special or piece is None:  # None: the model may know more ids than the tokenizer
            return ""
        self._window.append(token_id)
        if piece.startswith("<0x"):  # SentencePiece spells a rare character as a run of bytes, valid or not as a whole
            return ""
        text = self._window_text()
        # Only the last character can still be half of one, and it has at most four bytes, so it lies in the last four
        # tokens. They stay, also as the context of the next token: many tokenizers drop the space before a first word.
        certain = text[self._num_shown :].removesuffix(BROKEN)
        self._window = self._window[-4:]
        self._num_shown = len(self._window_text().removesuffix(BROKEN))
        return certain

    def _window_text(self) -> str:
        return self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        """Hand on `new` and the text held so far, but nothing from a stop string or what may become one."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, end = min(found)
            self._held = ""
        else:
            end = len(text) - max((overlap(text, stop) for stop in self._stop), default=0)
            self._held = text[end:]
        self.text += text[:end]
        return text[:end]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
