"""What the tests of the KV bookkeeping share: sequences from tokens, and the radix tree seen as a plain dict."""

from fluentllm.core.kv.radix import RadixTree
from fluentllm.core.sequence import Sequence
from fluentllm.core.types import Request, SamplingParams


def sequence(tokens: list[int], name: str = "r", *, prompt_logprobs: int | None = None) -> Sequence:
    params = SamplingParams(max_tokens=1000, prompt_logprobs=prompt_logprobs)
    return Sequence(Request(id=name, prompt=list(tokens), params=params), [])


def prefixes(tokens: list[int], page_size: int) -> list[tuple[int, ...]]:
    """The whole-page prefixes of `tokens`, shortest first."""
    return [tuple(tokens[:end]) for end in range(page_size, len(tokens) + 1, page_size)]


def dump(tree: RadixTree) -> dict[tuple[int, ...], int]:
    """Every cached prefix → the page that holds its last `page_size` tokens."""
    from fluentllm.core.kv.events import decode_tokens

    found: dict[tuple[int, ...], int] = {}
    stack = [(child, ()) for child in tree._root.children.values()]
    while stack:
        node, above = stack.pop()
        tokens = above + tuple(decode_tokens(node.tokens))
        for index, page in enumerate(node.pages):
            found[tokens[: len(above) + (index + 1) * tree.page_size]] = page
        stack += [(child, tokens) for child in node.children.values()]
    return found


def hashes(tree: RadixTree) -> set[int]:
    return {value for node in tree._order for value in node.hashes}
