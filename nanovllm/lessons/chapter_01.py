"""What chapter 01 shares: its pictures, a tiny decoder for the exercises, exercise checks."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm import LLM, SamplingParams
from nanovllm.lessons.checks import attempted, exercise
from nanovllm.lessons.example import PROMPTS
from nanovllm.viz.theme import EMPTY, HATCHES, INK, MUTED, QUIET, colour, hatch, new_figure, styled

# -- The opening picture -----------------------------------------------------------------------------------------------


def record_work(num_steps: int = 12) -> tuple[list[str], list[int], list[int]]:
    """Continue D with the engine, from nothing in every step, then as it is meant to.

    Returns the tokens as text, and how many of them each step computes, without and with what was kept.
    """
    llm = LLM(dtype="float32", num_kv_blocks=8, enable_prefix_caching=False)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPTS["D"])
    token_ids = list(prompt)
    with llm.trace() as without:
        for _ in range(num_steps):
            params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            (answer,) = llm.generate([token_ids], params, use_tqdm=False)
            token_ids += answer["token_ids"]
    with llm.trace() as with_cache:
        params = SamplingParams(temperature=0, max_tokens=num_steps, ignore_eos=True)
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
    assert prompt + answer["token_ids"] == token_ids
    texts = [str(tokenizer.decode([token_id])) for token_id in token_ids]
    llm.close()
    return texts, [step.num_tokens for step in without.steps], [step.num_tokens for step in with_cache.steps]


def draw_work() -> Figure:
    """A row for each step, a column for each token: which are computed, and which are only looked up."""
    texts, without, with_cache = record_work()
    figure = new_figure(9, 4.3)
    with styled():
        axes = figure.subplots(1, 2)
        for ax, title, computed in zip(axes, ("Without a cache", "With a KV cache"), (without, with_cache)):
            draw_steps(ax, texts, computed, context_lens=without)
            ax.set_title(f"{title}: {sum(computed)} tokens computed")
        handles = [
            Patch(facecolor=colour("D"), hatch=hatch("D"), edgecolor="white", label="computed in this step"),
            Patch(facecolor=colour("D"), alpha=0.25, label="kept: its keys and values are only read"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def draw_steps(ax: Axes, texts: list[str], computed: list[int], context_lens: list[int]) -> None:
    """Step after step, the last `computed` tokens of the context as full boxes and those before as pale ones."""
    for row, (num_computed, context_len) in enumerate(zip(computed, context_lens)):
        for column in range(context_len):
            new = column >= context_len - num_computed
            box: dict[str, Any] = dict(facecolor=colour("D"), edgecolor="white", linewidth=0.8)
            box |= dict(hatch=hatch("D")) if new else dict(alpha=0.25)
            ax.add_patch(Rectangle((column, row), 1, 1, **box))
        ax.text(context_len + 0.25, row + 0.5, str(num_computed), va="center", fontsize=8.5, color=INK)
    width = max(context_lens)
    ax.set(xlim=(0, width + 1.2), ylim=(len(computed), 0), ylabel="step")
    ax.set_yticks([row + 0.5 for row in range(len(computed))], [str(row) for row in range(len(computed))], fontsize=8.5)
    labels = [text.strip() or ("↵" if "\n" in text else "␣") for text in texts[:width]]
    ax.set_xticks([column + 0.5 for column in range(width)], labels, rotation=60, ha="right", fontsize=8.5)
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


# -- Heads that share --------------------------------------------------------------------------------------------------


def draw_heads() -> Figure:
    """The default model's 9 query heads over 9, 3 and 1 KV heads, and what each way keeps of a token."""
    figure = new_figure(9, 2.1)
    with styled():
        ways = {"multi-head": 9, "grouped-query": 3, "multi-query": 1}
        for ax, (name, num_kv_heads) in zip(figure.subplots(1, 3), ways.items()):
            draw_sharing(ax, 9, num_kv_heads)
            ax.set_title(f"{name}: {num_kv_heads} KV head{'s' * (num_kv_heads > 1)}")
            ax.text(4, -0.75, f"{2 * 30 * num_kv_heads * 64 * 4:,} bytes a token", ha="center", va="center")
    return figure


def draw_sharing(ax: Axes, num_heads: int, num_kv_heads: int) -> None:
    """Query heads in the upper row, KV heads in the lower one, and a line from each to the one that it reads."""
    sharing = num_heads // num_kv_heads
    for head in range(num_heads):
        kv_head = head // sharing
        middle = kv_head * sharing + (sharing - 1) / 2
        ax.plot([head, middle], [1, 0], color=QUIET, linewidth=1, zorder=0)
        ax.add_patch(Rectangle((head - 0.32, 0.78), 0.64, 0.44, facecolor=EMPTY, edgecolor=INK, linewidth=0.8))
        ax.text(head, 1, "Q", ha="center", va="center", fontsize=8)
        if head == kv_head * sharing:
            box = dict(facecolor=MUTED[1], hatch=HATCHES[1], edgecolor="white")
            ax.add_patch(Rectangle((middle - 0.42, -0.25), 0.84, 0.5, **box))  # type: ignore[arg-type]
            label = dict(boxstyle="round,pad=0.1", facecolor=MUTED[1], edgecolor="none")
            ax.text(middle, 0, "KV", ha="center", va="center", fontsize=8, bbox=label)
    ax.set(xlim=(-0.6, num_heads - 0.4), ylim=(-1.0, 1.35))
    ax.axis("off")


# -- Times at growing context ------------------------------------------------------------------------------------------


def draw_times(without: dict[int, float], with_cache: dict[int, float]) -> Figure:
    """Milliseconds of one step over the context, on one scale and, for the lower curve, on its own."""
    figure = new_figure(9, 2.9)
    with styled():
        left, right = figure.subplots(1, 2)
        left.plot(list(without), [1000 * s for s in without.values()], "o-", color="#D55E00", label="without a cache")
        for ax in (left, right):
            milliseconds = [1000 * s for s in with_cache.values()]
            ax.plot(list(with_cache), milliseconds, "s--", color="#0072B2", label="with a KV cache")
            ax.set(xlabel="context, tokens", ylabel="milliseconds")
        right.set_ylim(0, 1500 * max(with_cache.values()))
        left.set_title("one step, both ways")
        right.set_title("the lower curve alone")
        left.legend()
    return figure


# -- A tiny decoder ----------------------------------------------------------------------------------------------------


class TinyDecoder:
    """Two layers of attention with random weights. `forward` is the chapter's, but gives logits for every new token.

    The cache is a dict: layer -> its keys and values, `[num_tokens, num_kv_heads, head_dim]` each.
    """

    VOCAB, HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS = 50, 8, 2, 2

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = self.HEAD_DIM * self.NUM_KV_HEADS

        def random_matrix(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embedding = random_matrix(self.VOCAB, size)
        self.places = random_matrix(256, size)
        self.projections = random_matrix(self.NUM_LAYERS, 3, size, size) / size**0.5
        self.num_calls = 0

    def forward(self, token_ids: list[int], cache: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Adds the new tokens to the cache; returns `[len(token_ids), VOCAB]`: what would follow each of them."""
        self.num_calls += 1
        start = len(cache[0][0]) if cache else 0
        num_new, context_len = len(token_ids), start + len(token_ids)
        ahead = torch.ones(num_new, context_len, dtype=torch.bool).triu(start + 1)
        x = self.embedding[token_ids] + self.places[start:context_len]
        for i in range(self.NUM_LAYERS):
            query, key, value = ((x @ w).unflatten(1, (-1, self.HEAD_DIM)) for w in self.projections[i])
            if i in cache:
                key, value = torch.cat([cache[i][0], key]), torch.cat([cache[i][1], value])
            cache[i] = key, value
            scores = torch.einsum("qhd,khd->hqk", query, key).masked_fill(ahead, -torch.inf)
            x = x + torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value).flatten(1)
        return x @ self.embedding.T


# -- Exercise checks ---------------------------------------------------------------------------------------------------


@exercise(1, "No engine is faster than this, however good its kernels are.")
def check_tokens_per_second(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    cases = [
        ("Llama-3-8B on an H100", 3.35e12, 15.01e9, 131_072, 1024, 1),
        ("the same with a batch of 64", 3.35e12, 15.01e9, 131_072, 1024, 64),
    ]
    for _ in range(5):
        sizes = (random.uniform(1e11, 4e12), random.uniform(1e9, 1e11), random.randint(10_000, 500_000))
        cases.append(("a made-up model", *sizes, random.randint(100, 10_000), random.randint(2, 100)))
    for name, bandwidth, weight_bytes, bytes_per_token, context_len, batch_size in cases:
        cache_bytes = batch_size * context_len * bytes_per_token
        right = batch_size * bandwidth / (weight_bytes + cache_bytes)
        got = attempted(answer(bandwidth, weight_bytes, bytes_per_token, context_len, batch_size))
        if abs(got - right) <= 1e-6 * right:
            continue
        said = f"for {name} the limit is {right:,.3f} tokens a second, and you return {got:,.3f}."
        if abs(got - bandwidth / (weight_bytes + cache_bytes)) <= 1e-6 * got:
            said += f" That is the number of steps. Each makes a token for every one of {batch_size} sequences."
        elif abs(got - batch_size * bandwidth / weight_bytes) <= 1e-6 * got:
            said += " A step reads the weights, and also the keys and values of every sequence."
        elif abs(got - bandwidth / (weight_bytes + cache_bytes / batch_size)) <= 1e-6 * got:
            said += " The weights are read once a step, for all sequences together."
        yield said


@exercise(2, "However long the text becomes, this cache does not grow.")
def check_slide(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for window in (4, 1, random.randint(2, 9)):
        generator = torch.Generator().manual_seed(random.randrange(1000))
        keys, values, queries = torch.randn(3, 3 * window + 2, 2, 8, generator=generator)
        key, value = keys[:0], values[:0]
        for n in range(1, len(keys) + 1):
            returned = attempted(answer(key, value, keys[n - 1 : n], values[n - 1 : n], window))
            if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
                yield "return two tensors: the keys, and the values."
            key, value = returned
            case = f"with a window of {window}, after token number {n},"
            right = min(n, window)
            if len(key) != len(value):
                yield f"{case} you keep {len(key)} keys, but {len(value)} values."
            elif len(key) > right:
                yield f"{case} you keep {len(key)} tokens. The window is {right}, the new token included."
            elif len(key) < right:
                yield f"{case} you keep {len(key)} tokens. The new one sees {right}, itself included."
            elif not close(attend_one(queries[n - 1], key, value), windowed(queries, keys, values, n, window)):
                yield f"{case} attention over what you keep is not attention over the last {right} tokens, in order."


def attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one query, `[num_heads, head_dim]`, to all keys."""
    weights = torch.einsum("hd,khd->hk", query, key).softmax(dim=-1)
    return torch.einsum("hk,khd->hd", weights, value)


def windowed(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, n: int, window: int) -> torch.Tensor:
    """Token number `n` computed from nothing: all scores, those outside of the window hidden."""
    scores = torch.einsum("hd,khd->hk", queries[n - 1], keys)
    places = torch.arange(len(keys))
    scores = scores.masked_fill((places >= n) | (places < n - window), -torch.inf)
    return torch.einsum("hk,khd->hd", scores.softmax(dim=-1), values)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-5)


@exercise(3, "68 bytes where there were 256, and every number is off by at most half a step.")
def check_pack(answer: Any, random: random.Random) -> Iterator[str]:
    pack, unpack = answer
    for num_tokens in (1, random.randint(2, 20)):
        generator = torch.Generator().manual_seed(random.randrange(1000))
        x = torch.randn(num_tokens, 3, 64, generator=generator)
        x[0, 1] *= 100  # some heads are loud
        x[-1, 2] = 0  # and some say nothing
        with FromNaN() as casts:
            numbers, scale = attempted(pack(x))
        if casts.from_nan:
            yield (
                "a head of zeros has the scale 0 with you, and 0 / 0 is NaN: "
                "what that is as an int8 is up to the machine."
            )
        half_steps = x.abs().amax(dim=-1, keepdim=True) / 127 / 2
        if numbers.dtype != torch.int8 or numbers.shape != x.shape:
            yield f"the packed numbers are {list(numbers.shape)} {numbers.dtype}; make them {list(x.shape)} torch.int8."
            return
        if scale.numel() > num_tokens * 3:
            yield f"you keep {scale.numel()} scales for {num_tokens * 3} heads of tokens: one for each is enough."
        error = (attempted(unpack(numbers, scale)) - x).abs()
        if not (error <= 1.01 * half_steps + 1e-6).all():
            worst = int((error - half_steps).amax(dim=-1).argmax())
            token, head = divmod(worst, 3)
            said = f"token {token}, head {head} comes back with an error of {error[token, head].max():.4f}; "
            said += f"half a step is {half_steps[token, head].item():.4f}. "
            yield said + (
                "One loud head spoils it for the others: give each token and head a scale of its own."
                if scale.numel() < num_tokens * 3
                else "The largest number of the 64 becomes 127 or -127; round the others, do not cut them off."
            )


class FromNaN(TorchDispatchMode):
    """Notices in a `with` block whether NaN is made an int8, which gives 0 here and another number elsewhere."""

    from_nan = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.int8:
            self.from_nan |= any(bool(x.isnan().any()) for x in args if isinstance(x, torch.Tensor))
        return result


@exercise(4, "This is the heart of speculative decoding: several tokens from one reading of the weights.")
def check_verify(answer: Callable[..., Any], random: random.Random) -> Iterator[str]:
    for _ in range(3):
        model = TinyDecoder(random.randrange(1000))
        prompt = [random.randrange(50) for _ in range(6)]
        text = continued(model, prompt, 24)
        cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        model.forward(prompt[:-1], cache)
        n = len(prompt)  # how many tokens are certain; the cache holds one less
        while n < len(text) - 4:
            num_right, num_guesses = random.randint(0, 4), random.randint(1, 4)
            guesses = [t if i < num_right else (t + 1) % 50 for i, t in enumerate(text[n : n + num_guesses])]
            right = text[n : n + min(num_right, num_guesses) + 1]
            calls = model.num_calls
            got = attempted(answer(model.forward, cache, text[n - 1], list(guesses)))
            case = f"the guesses are {guesses}, the model itself would say {text[n : n + num_guesses + 1]}."
            yield from complaints_about_verify(got, right, case, model.num_calls - calls)
            n += len(right)
            yield from complaints_about_cache(model, cache, text, n - 1, case)


def continued(model: TinyDecoder, token_ids: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation, token by token, computed from nothing."""
    token_ids = list(token_ids)
    for _ in range(num_tokens):
        token_ids.append(int(model.forward(token_ids, {})[-1].argmax()))
    return token_ids


def complaints_about_verify(got: Any, right: list[int], case: str, num_calls: int) -> Iterator[str]:
    if list(got) == right[:-1]:
        yield f"{case} You return {list(got)}; after the right guesses comes one more token, the model's own choice."
    elif list(got) != right:
        yield f"{case} So {right} is certain, and you return {list(got)}."
    elif num_calls > 1:
        yield f"you call forward {num_calls} times. All guesses go into one step: that is where the time is won."


def complaints_about_cache(
    model: TinyDecoder, cache: dict[int, tuple[torch.Tensor, torch.Tensor]], text: list[int], num_kept: int, case: str
) -> Iterator[str]:
    computed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    model.forward(text[:num_kept], computed)
    for i, pair in computed.items():
        for kept, fresh in zip(cache[i], pair):
            if len(kept) > num_kept:
                yield (
                    f"{case} In layer {i} the cache holds {len(kept)} tokens afterwards, and {num_kept} are right: "
                    "roll the rejected guesses back, in the dict that you were given."
                )
            elif len(kept) < num_kept:
                yield f"{case} In layer {i} the cache holds {len(kept)} tokens afterwards; {num_kept} were right."
            elif not close(kept, fresh):
                yield f"{case} In layer {i} the cache is not what computing from nothing gives."
