"""The radix tree: which token prefixes have their KV in which pages. `KVCache` matches new requests against it.

Edges are compressed: a node is a run of whole pages. Nodes begin and end at page borders, so siblings differ within
their first page, and a node's children are found by that page's tokens. Tokens are kept as packed bytes: comparing and
copying runs is then a memcmp and a memcpy, and a prompt of n tokens matches in O(n) with a very small constant.

What belongs to a page besides its tokens (KV, a hidden state) lies in tensors indexed by the page's number.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from .events import TOKEN_BYTES, KVEventLog, chain_hashes, encode_tokens
from .pages import IntegrityError, PageAllocator

if TYPE_CHECKING:
    from collections.abc import Iterator


class Node:
    """A run of pages. While a node lives, the tokens from the root to any depth within it never change: runs grow at
    their end, are split (the node stays the lower part) or lose their end (`trimmed`, and then never grow again)."""

    __slots__ = ("children", "depth", "hashes", "pages", "parent", "tokens", "trimmed")

    def __init__(self, parent: Node | None, tokens: bytearray, pages: list[int], depth: int) -> None:
        self.parent = parent
        """None for the root and for nodes that have left the tree."""
        self.tokens = tokens
        self.pages = pages
        self.depth = depth
        """Pages from the root to the end of this run."""
        self.hashes: list[int] = []
        """One a page if somebody listens, else empty."""
        self.children: dict[bytes, Node] = {}
        self.trimmed = False

    @property
    def start(self) -> int:
        return self.depth - len(self.pages)


class Match(NamedTuple):
    pages: list[int]
    length: int
    """Tokens: whole pages."""
    node: Node
    """Where the match ends."""


class Insertion(NamedTuple):
    added: list[int]
    """Those of the given pages that the tree has taken: always the last ones."""
    depth: int
    """Pages of the whole prefix, all known to the tree now."""
    node: Node
    """Where the prefix ends."""


class RadixTree:
    """Token prefixes → pages. Holds its pages by one lease of kind `tree`."""

    def __init__(self, allocator: PageAllocator, page_size: int, events: KVEventLog | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"a page has at least 1 token, not {page_size}")
        self.allocator = allocator
        self.page_size = page_size
        self._width = page_size * TOKEN_BYTES
        self._events = events
        self._lease = allocator.lease("tree", "radix tree")
        self._root = Node(None, bytearray(), [], 0)
        # Least recently used first. Touching a node touches its ancestors after it, so every node comes before its
        # parent, and a node whose children have all been taken comes up in its turn.
        self._order: OrderedDict[Node, None] = OrderedDict()

    @property
    def pages(self) -> int:
        """Pages that the tree holds."""
        return len(self._lease.pages)

    def match(self, tokens: list[int], limit: int | None = None) -> Match:
        """The longest prefix of `tokens` that is cached, in whole pages, at most `limit` of them. Counts as a use."""
        count = len(tokens) // self.page_size
        if limit is not None:
            count = min(count, limit)
        if count <= 0 or not self._order:
            return Match([], 0, self._root)
        node, depth = self._descend(self._root, 0, encode_tokens(tokens[: count * self.page_size]))
        if depth < node.depth:
            node = self._split(node, depth)
        self._touch(node)
        runs = []
        above: Node | None = node
        while above is not None:
            runs.append(above.pages)
            above = above.parent
        return Match([page for run in reversed(runs) for page in run], depth * self.page_size, node)

    def insert(self, tokens: list[int], pages: list[int], node: Node | None = None, depth: int = 0) -> Insertion:
        """Remember that the KV of `tokens` is in `pages`, one page for each `page_size` tokens.

        With `node` and `depth` (from `find`), they continue the prefix of `depth` pages that ends in `node`. Where the
        tree has a page for the same prefix already, it keeps its own and does not take the given one; pages behind it
        are taken all the same. The tree shares what it takes: the caller's lease must hold `pages`.
        Raises `ValueError` if tokens and pages do not fit each other.
        """
        if len(tokens) != len(pages) * self.page_size:
            raise ValueError(
                f"{len(pages)} pages of {self.page_size} cannot hold {len(tokens)} tokens: only full pages enter the tree"
            )
        data = encode_tokens(tokens)
        end = depth + len(pages)
        node, reached = self._descend(node or self._root, depth, data)
        added = pages[reached - depth :]
        if added:
            if reached < node.depth:
                node = self._split(node, reached)
            self.allocator.share(self._lease, added)
            node = self._append(node, data[(reached - depth) * self._width :], added)
        self._touch(node)
        return Insertion(added, end, node)

    def find(self, node: Node | None, depth: int) -> Node | None:
        """Where the prefix of `depth` pages ends now, which an earlier call said ends in `node`; None if it is gone."""
        if depth == 0:
            return self._root
        if node is None or node.parent is None or depth > node.depth:
            return None
        while depth <= node.start and node.parent is not None:
            node = node.parent
        return node

    def evict(self, count: int) -> int:
        """Free at least `count` pages if that many are held by the tree only, else all of those. Returns how many.

        Takes the ends of the least recently used leaves, and never a page that somebody else leases. If those do not
        suffice, the rest lies above pages that a request leases (it computed the same prefix in pages of its own): then
        the tree forgets these too, which leaves them with their request.
        """
        freed = self._evict_leaves(count)
        if freed < count and self.allocator.evictable:
            for node in list(self._order):
                freed += self._forget_unleased(node)
                if freed >= count:
                    break
        return freed

    def clear(self) -> int:
        """Forget everything. Returns how many pages became free; leased ones stay with their requests."""
        for node in self._order:
            node.parent = None
            node.children.clear()
        self._order.clear()
        self._root.children.clear()
        if self._events is not None:
            self._events.cleared()
        return self.allocator.drop(self._lease, list(self._lease.pages))

    def check(self) -> None:
        """Verify the whole structure. Raises `IntegrityError` with what is broken."""
        held: list[int] = []
        seen: set[Node] = set()
        for node in self._order:
            parent = node.parent
            if parent is None or (parent is not self._root and parent not in self._order):
                raise IntegrityError(f"a node at depth {node.depth} hangs on nothing")
            if parent.children.get(bytes(node.tokens[: self._width])) is not node:
                raise IntegrityError(f"a node at depth {node.depth} is not among its parent's children")
            if parent in seen:
                raise IntegrityError(f"a node at depth {node.depth} was used after its parent")
            if not node.pages or len(node.tokens) != len(node.pages) * self._width or node.start != parent.depth:
                raise IntegrityError(
                    f"a run of {len(node.pages)} pages and {len(node.tokens)} bytes ends at depth {node.depth}"
                )
            if len(node.hashes) != (len(node.pages) if self._events is not None else 0):
                raise IntegrityError(f"{len(node.pages)} pages have {len(node.hashes)} hashes")
            seen.add(node)
            held += node.pages
        children = sum(len(node.children) for node in seen) + len(self._root.children)
        if children != len(seen):
            raise IntegrityError(f"{children} children, {len(seen)} nodes")
        if len(held) != self.pages or set(held) != self._lease.pages:
            raise IntegrityError(f"the nodes hold {len(held)} pages, the lease {self.pages}")

    # ----------------------------------------------------------------------------------------------------------- helpers
    def _descend(self, node: Node, depth: int, data: bytes) -> tuple[Node, int]:
        """Follow `data` from `depth` pages on, a point within or at the end of `node`. Returns where it differs, within
        or at the end of a node that it reaches at least one page into."""
        width, end = self._width, len(data)
        at = 0
        while True:
            inside = (depth - node.start) * width
            common = self._common(node.tokens, inside, data, at)
            at += common
            depth += common // width
            if at == end or depth < node.depth:
                return node, depth
            child = node.children.get(data[at : at + width])
            if child is None:
                return node, depth
            node = child

    def _common(self, run: bytearray, start: int, data: bytes, at: int) -> int:
        """Bytes, in whole pages, in which `run[start:]` and `data[at:]` agree."""
        width = self._width
        high = min(len(run) - start, len(data) - at) // width
        if run[start : start + high * width] == data[at : at + high * width]:
            return high * width
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            a, b = low * width, middle * width
            if run[start + a : start + b] == data[at + a : at + b]:
                low = middle
            else:
                high = middle
        return low * width

    def _split(self, node: Node, depth: int) -> Node:
        """Cut a node in two; it stays the lower part. Returns the upper one, which the caller must touch."""
        keep = depth - node.start
        parent = node.parent
        if parent is None or not 0 < keep < len(node.pages):
            raise IntegrityError(f"a run of {len(node.pages)} pages cannot be split after {keep}")
        upper = Node(parent, node.tokens[: keep * self._width], node.pages[:keep], depth)
        upper.hashes = node.hashes[:keep]
        parent.children[bytes(upper.tokens[: self._width])] = upper
        del node.tokens[: keep * self._width], node.pages[:keep], node.hashes[:keep]
        node.parent = upper
        upper.children[bytes(node.tokens[: self._width])] = node
        self._order[upper] = None
        return upper

    def _append(self, node: Node, data: bytes, pages: list[int]) -> Node:
        """Put pages behind the end of a node, in its own run where nothing speaks against it."""
        hashes: list[int] = []
        if self._events is not None:
            parent = node.hashes[-1] if node.hashes else None
            hashes = chain_hashes(parent, data, self._width)
            self._events.stored(parent, hashes, data)
        if node is self._root or node.children or node.trimmed:
            child = Node(node, bytearray(), [], node.depth)
            node.children[data[: self._width]] = child
            node = child
            self._order[node] = None
        node.tokens += data
        node.pages += pages
        node.hashes += hashes
        node.depth += len(pages)
        return node

    def _touch(self, node: Node) -> None:
        while node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _evict_leaves(self, count: int) -> int:
        freed = 0
        emptied = []
        # Children come before their parents, so one pass sees every node after all below it are gone.
        for node in self._order:
            if freed >= count:
                break
            if node.children:
                continue
            keep = len(node.pages)
            least = max(0, keep - (count - freed))
            while keep > least and self.allocator.holders(node.pages[keep - 1]) == 1:
                keep -= 1
            if keep < len(node.pages):
                freed += self._trim(node, keep)
                if keep == 0:
                    emptied.append(node)
        for node in emptied:
            del self._order[node]
        return freed

    def _trim(self, node: Node, keep: int) -> int:
        """Take all but the first `keep` pages from a node without children. With none left it leaves the tree; the
        caller removes it from the order. Returns the pages freed."""
        parent = node.parent
        if parent is None or node.children:
            raise IntegrityError(f"only a leaf can be trimmed, not the node at depth {node.depth}")
        gone = node.pages[keep:]
        if self._events is not None:
            self._events.removed(node.hashes[keep:])
        if keep == 0:
            del parent.children[bytes(node.tokens[: self._width])]
            node.parent = None
        node.trimmed = True
        node.depth -= len(gone)
        del node.tokens[keep * self._width :], node.pages[keep:], node.hashes[keep:]
        return self.allocator.drop(self._lease, gone)

    def _forget_unleased(self, node: Node) -> int:
        """From the node's first page that only the tree holds, forget it and everything below. Returns pages freed."""
        keep = next((i for i, page in enumerate(node.pages) if self.allocator.holders(page) == 1), None)
        if keep is None:
            return 0
        freed = 0
        for below in reversed(list(_descendants(node))):
            freed += self._trim(below, 0)
            del self._order[below]
        freed += self._trim(node, keep)
        if keep == 0:
            del self._order[node]
        return freed


def _descendants(node: Node) -> Iterator[Node]:
    """All below the node, each after its parent."""
    stack = list(node.children.values())
    while stack:
        below = stack.pop()
        yield below
        stack += below.children.values()
