"""The slot tables: the device-resident state of running requests, one row a slot.

What a decode step needs and what it produces stays in these tables, so that a step can be launched before the one before
it has been read. A step program gathers rows by slot, and writes back what it drew; the host writes a row only when a
request enters (`admit`) or gets more pages (`grant`), ordered on the same stream as the programs.

Terms: a slot's *history* is its prompt and what it has generated; `length` counts the tokens of it. While a request
decodes, the KV of all but the last token of the history is written, and `drafted` drafts to be verified stand in the
history from `length` on. The last row of every table belongs to no request: it is finished for ever and pads batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .staging import to_device, upload, upload_all
from .types import MAX_LOGIT_BIAS, MAX_STOP_IDS, Feature, GrammarLoad, PageGrant, SamplingParams, SlotInit, TokenMasks

_INTS = ("length", "prompt_length", "end", "min_end", "top_k", "logprobs", "seed", "drafted")
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


def pages_of(context: int, max_drafts: int, page_size: int) -> int:
    """Of one sequence of `context` tokens: a step verifies up to max_drafts tokens past the end, and drafts as many again."""
    return -(-(context + 2 * max_drafts) // page_size)


def context_of(pages: int, max_drafts: int, page_size: int) -> int:
    """Tokens of the longest sequence that has room in so many pages."""
    return pages * page_size - 2 * max_drafts


class SlotTables:
    """Tables of `slots` + 1 rows on `device`.

    `ints` and `floats` hold the scalars of a slot side by side, so that an admission is one copy each; the named columns
    are views of them.
    """

    def __init__(
        self,
        slots: int,
        max_model_len: int,
        page_size: int,
        vocab_size: int,
        device: torch.device,
        *,
        max_drafts: int = 0,
        grammar_states: int = 0,
        token_masks: bool = False,
    ) -> None:
        rows = slots + 1
        self.slots = slots
        self.padding_slot = slots
        self.device = device
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.max_drafts = max_drafts
        self.max_pages = pages_of(max_model_len, max_drafts, page_size)
        self.history = torch.zeros(rows, max_model_len + 2 * max_drafts + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(rows, self.max_pages, dtype=torch.int32, device=device)
        self.stop_ids = torch.full((rows, MAX_STOP_IDS), -1, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(rows, MAX_LOGIT_BIAS, dtype=torch.int64, device=device)
        self.bias_values = torch.zeros(rows, MAX_LOGIT_BIAS, dtype=torch.float32, device=device)
        self.ints = torch.zeros(rows, len(_INTS), dtype=torch.int64, device=device)
        self.floats = torch.zeros(rows, len(_FLOATS), dtype=torch.float32, device=device)
        self.finished = torch.ones(rows, dtype=torch.bool, device=device)
        # Only requests with penalties fill and count in these two; the neutral parameters of others cancel what they read.
        self.prompt_seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.output_counts = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)

        self.grammar_state = torch.zeros(rows, dtype=torch.int64, device=device)
        # Row 0 allows everything and leads to itself; the others are grammars' (`core.grammars`).
        self.grammar_next = torch.zeros(1 + grammar_states, vocab_size, dtype=torch.int32, device=device)

        # Masks of matchers on the host, one bit a token, the lowest first: of a slot's next positions, as many as `masked`.
        # Slots without a matcher allow everything everywhere.
        shape = (max_drafts + 1, 4 * -(-vocab_size // 32)) if token_masks else (1, 0)
        self.token_masks = torch.full((rows, *shape), 255, dtype=torch.uint8, device=device)
        self.masked = torch.full((rows,), shape[0], dtype=torch.int64, device=device)

        self.length, self.prompt_length, self.end, self.min_end, self.top_k, self.logprobs, self.seed, self.drafted = (
            self.ints.unbind(1)
        )
        self.temperature, self.top_p, self.min_p, self.presence, self.frequency, self.repetition = self.floats.unbind(1)
        self.ints[self.padding_slot, 0] = 1
        self.floats[self.padding_slot, _FLOATS.index("repetition")] = 1.0

    def nbytes(self) -> int:
        tables = (self.history, self.page_table, self.stop_ids, self.bias_ids, self.bias_values, self.ints, self.floats)
        wide = (self.finished, self.prompt_seen, self.output_counts, self.grammar_next, self.token_masks)
        return sum(t.nbytes for t in (*tables, *wide))

    def admit(self, init: SlotInit, features: int) -> None:
        """Fill the row of a request that enters, or comes back after a preemption."""
        row, params = init.slot, init.params
        self._put(self.history[row, : len(init.tokens)], init.tokens)
        # What is written past the pages of a request goes to the scratch page, never to those of the slot's last one.
        self.page_table[row] = 0
        self._put(self.page_table[row, : len(init.pages)], init.pages)
        self._put(self.stop_ids[row], (init.stop_ids + [-1] * MAX_STOP_IDS)[:MAX_STOP_IDS])
        self._put(self.ints[row], _ints(init))
        self._put(self.floats[row], _floats(params))
        # Not by assignment: one value is copied from pageable memory then, and the host waits for all that is queued.
        self.finished[row].fill_(False)
        # A neighbour with a bias makes the step add every row's, so a request without one must not find its predecessor's.
        self.bias_values[row] = 0.0
        self.grammar_state[row].fill_(init.grammar_state)
        if self.token_masks.numel():
            self.token_masks[row].fill_(255)
            self.masked[row].fill_(self.token_masks.shape[1])
        if features & Feature.BIAS:
            self._admit_bias(row, params.logit_bias)
        if features & Feature.PENALTIES:
            self._admit_counts(row, init)

    def load_grammar(self, load: GrammarLoad) -> None:
        """Write a grammar's rows; its states are counted from its first row."""
        table = torch.frombuffer(bytearray(load.next), dtype=torch.int32).view(load.states, self.vocab_size)
        table = torch.where(table < 0, table, table + load.first)
        self.grammar_next[load.first : load.first + load.states] = to_device(table, self.device)

    def mask(self, masks: TokenMasks) -> None:
        """Write what a slot may draw at its next positions. Words of 32 bits as bytes: on the little-endian machines that this
        runs on, bit t % 8 of byte t // 8 is token t's."""
        bits = torch.frombuffer(bytearray(masks.bits), dtype=torch.uint8).view(masks.rows, -1)
        self.token_masks[masks.slot, : masks.rows] = to_device(bits, self.device)
        self.masked[masks.slot].fill_(masks.rows)

    def grant(self, grants: Sequence[PageGrant]) -> None:
        """Write pages of any number of slots: one upload, for of 256 sequences 16 cross into a new page of 16 tokens in every
        step."""
        places = [grant.slot * self.max_pages + grant.first + i for grant in grants for i in range(len(grant.pages))]
        at, pages = upload_all([places, [page for grant in grants for page in grant.pages]], self.device)
        self.page_table.view(-1).index_copy_(0, at, pages.to(torch.int32))

    def _admit_bias(self, row: int, bias: dict[int, float]) -> None:
        # Padding adds 0 to token 0.
        padding = MAX_LOGIT_BIAS - len(bias)
        self._put(self.bias_ids[row], [*bias.keys(), *[0] * padding])
        self._put(self.bias_values[row], [*bias.values(), *[0.0] * padding])

    def _admit_counts(self, row: int, init: SlotInit) -> None:
        self.prompt_seen[row] = False
        self.output_counts[row] = 0
        tokens = upload(init.tokens, torch.int64, self.device)
        prompt, output = tokens[: init.prompt_length], tokens[init.prompt_length :]
        self.prompt_seen[row].index_fill_(0, prompt, True)
        self.output_counts[row].scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _put(self, place: Tensor, values: list[int] | list[float]) -> None:
        """Write values over a piece of a table, in stream order."""
        place.copy_(torch.tensor(values, dtype=place.dtype, pin_memory=self.device.type == "cuda"), non_blocking=True)


def _ints(init: SlotInit) -> list[int]:
    params = init.params
    end = init.prompt_length + params.max_tokens
    logprobs = -1 if params.logprobs is None else params.logprobs
    return [
        len(init.tokens),
        init.prompt_length,
        end,
        init.prompt_length + params.min_tokens,
        params.top_k,
        logprobs,
        params.seed,
        0,
    ]


def _floats(params: SamplingParams) -> list[float]:
    return [
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    ]
