"""Score all continuations of a document in one forward pass, in which every distinct prefix is computed once.

lm-eval asks for log p(continuation | context), one request per choice. The requests of a document are laid out as a
tree of tokens: a token that several of them share, at the same place behind the same tokens, is one node. A node
attends to its ancestors and itself, and its position is its depth, so that its hidden state is that of the plain
sequence. The vocabulary's logits are computed at the nodes that predict a continuation's token, and nowhere else.

Over the seven sets of the card that is 2.4 instead of 4.8 million tokens. The sums equal those of lm-eval's HFLM but
for rounding (tests/evaluation/test_shared_prefix.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import log_softmax

#: Architectures whose forward pass is known to take a mask of the tree's form, and whose head is one linear layer.
MODEL_TYPES = ("gpt_neox", "gptj")
#: Positions whose logits are held at once: 1024 x 50280 float32 are 206 MB.
_POSITIONS = 1024
#: Tokens of a forward pass, padding included, where the batch size is "auto". See docs/evaluation.md for the CPU's.
AUTO_TOKENS = {"cpu": 1024, "cuda": 16384}

#: In a batch of size "auto", a document's share of the longest one's length, at least.
_SIMILAR = 0.75

Request = tuple[list[int], list[int]]  # context, continuation


@dataclass
class Tree:
    """The requests of one document; a parent comes before its children, that of a root is -1."""

    tokens: list[int] = field(default_factory=list)  # of each node
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    edges: list[tuple[int, int, int]] = field(default_factory=list)  # (node, token to predict, number of the request)

    @property
    def is_chain(self) -> bool:
        """Whether every node's parent is the node before it: then the plain causal mask will do."""
        return len(self.tokens) == self.depths[-1] + 1

    def ancestors(self) -> np.ndarray:
        """[nodes, nodes] bool: [i, j] where j is i or an ancestor of i."""
        mask = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node, :node] = mask[parent, :node]
        return mask


def build_tree(requests: Sequence[tuple[int, Request]], window: int) -> Tree:
    """Merge numbered requests; one that is longer than the window loses tokens on its left, as in HFLM."""
    tree, known = Tree(), {}
    for number, (context, continuation) in requests:
        path, node = [], -1
        for token in (context + continuation)[-(window + 1) : -1]:
            key = (node, token)
            if key not in known:
                known[key] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.depths.append(len(path))
            node = known[key]
            path.append(node)
        at = path[-len(continuation) :]
        tree.edges += [(node, token, number) for node, token in zip(at, continuation, strict=True)]
    return tree


@dataclass
class TokenCounts:
    """Requests and their tokens."""

    requests: int = 0
    asked: int = 0  # tokens of all requests, each on its own, without padding
    useful: int = 0  # tokens of the forward passes without padding
    computed: int = 0  # the same with padding

    def reset(self) -> None:
        self.__init__()

    def ask(self, requests: Iterable[Request], window: int) -> None:
        """Count requests that lose what is longer than the window."""
        lengths = [min(window, len(context) + len(continuation) - 1) for context, continuation in requests]
        self.requests += len(lengths)
        self.asked += sum(lengths)

    def speed(self, seconds: float) -> dict[str, float]:
        """The counts of `seconds` seconds, as they are stored and printed."""
        return {
            "seconds": seconds, "requests": self.requests, "tokens_asked": self.asked, "tokens_computed": self.computed,
            "tokens_per_s": self.asked / seconds, "padding_share": 1 - self.useful / self.computed,
        }  # fmt: skip


class Scorer:
    """Scores documents on a loaded model.

    Args:
        model: of one of MODEL_TYPES, in evaluation mode, on one device, with sdpa or eager attention.
        window: most tokens of a sequence.
        rows: documents in one forward pass; None for as many as AUTO_TOKENS holds.
        softmax_dtype: of the log-probabilities; None for the model's.
    """

    def __init__(self, model, window: int, rows: int | None = None, softmax_dtype: torch.dtype | None = torch.float32):
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"model type {model.config.model_type!r}, expected one of {MODEL_TYPES}")
        self.capture, self.head = model.base_model, model.get_output_embeddings()
        self.device, self.dtype = model.device, model.dtype
        self.window, self.rows, self.softmax_dtype = window, rows, softmax_dtype or model.dtype
        self.tokens = AUTO_TOKENS.get(self.device.type, AUTO_TOKENS["cpu"])
        self.counts = TokenCounts()

    @torch.inference_mode()
    def score(
        self, documents: Sequence[Sequence[Request]], advance: Callable[[int], None] = lambda done: None
    ) -> list[list[tuple[float, bool]]]:
        """(log-likelihood, whether greedy decoding would give exactly that) of each request of each document.

        Args:
            documents: requests of one document share most of their tokens. A continuation has 1 to `window` tokens.
            advance: called with the number of requests done since its last call.
        """
        first = np.cumsum([0, *map(len, documents)])
        starts = first[:-1].tolist()
        trees = [
            build_tree(list(enumerate(requests, start)), self.window)
            for start, requests in zip(starts, documents, strict=True)
        ]
        self.counts.ask(itertools.chain.from_iterable(documents), self.window)
        sums, greedy = np.zeros(first[-1]), np.ones(first[-1], dtype=bool)
        for batch in self._batches(trees):
            numbers, values, best = self._forward(batch)
            np.add.at(sums, numbers, values)
            np.logical_and.at(greedy, numbers, best)
            advance(sum(len({number for _, _, number in tree.edges}) for tree in batch))
        # Each sum is rounded once to the number type of its terms, as a tensor's sum is.
        rounded = torch.from_numpy(sums).to(self.softmax_dtype).tolist()
        flat = list(zip(rounded, greedy.tolist(), strict=True))
        return [flat[start : start + len(requests)] for start, requests in zip(starts, documents, strict=True)]

    def _batches(self, trees: list[Tree]) -> Iterator[list[Tree]]:
        """Largest first: out of memory happens at once or not at all, and neighbours need little padding."""
        trees = sorted(trees, key=lambda tree: -len(tree.tokens))
        while trees:
            width = len(trees[0].tokens)
            if (rows := self.rows) is None:
                most = max(1, self.tokens // width)
                rows = sum(len(tree.tokens) >= _SIMILAR * width for tree in trees[:most])
            yield trees[:rows]
            trees = trees[rows:]

    def _forward(self, trees: list[Tree]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each edge: number of its request, log-probability of its token, whether that is the likeliest one."""
        width = len(trees[0].tokens)
        self.counts.useful += sum(len(tree.tokens) for tree in trees)
        self.counts.computed += width * len(trees)
        hidden = self.capture(**self._inputs(trees, width), use_cache=False)[0].flatten(0, 1)  # [rows * width, hidden]
        edges = np.array(
            [(row * width + node, *rest) for row, tree in enumerate(trees) for node, *rest in tree.edges],
            dtype=np.int64,
        )
        edges = edges[np.argsort(edges[:, 0], kind="stable")]
        places, place_of_edge = np.unique(edges[:, 0], return_inverse=True)
        values, best = [], []
        for start in range(0, len(places), _POSITIONS):
            here = torch.from_numpy(places[start : start + _POSITIONS]).to(self.device)
            logs = log_softmax(self.head(hidden[here]), dim=-1, dtype=self.softmax_dtype)  # [positions, vocabulary]
            first, last = np.searchsorted(place_of_edge, (start, start + _POSITIONS))
            at = torch.from_numpy(place_of_edge[first:last] - start).to(self.device)
            token = torch.from_numpy(edges[first:last, 1]).to(self.device)
            values.append(logs[at, token].double().cpu().numpy())
            best.append((logs.argmax(-1)[at] == token).cpu().numpy())
        return edges[:, 2], np.concatenate(values), np.concatenate(best)

    def _inputs(self, trees: list[Tree], width: int) -> dict[str, torch.Tensor]:
        """Padded on the right with token 0; a padding node attends to itself only, and no other node to it."""
        ids = np.zeros((len(trees), width), dtype=np.int64)
        for row, tree in enumerate(trees):
            ids[row, : len(tree.tokens)] = tree.tokens
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device)}
        if all(tree.is_chain for tree in trees):
            return inputs
        depths = np.zeros_like(ids)
        mask = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
        for row, tree in enumerate(trees):
            depths[row, : len(tree.tokens)] = tree.depths
            mask[row, : len(tree.tokens), : len(tree.tokens)] = tree.ancestors()
        allowed = torch.from_numpy(mask).to(self.device)[:, None]  # [rows, 1, width, width]
        added = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        added.masked_fill_(~allowed, torch.finfo(self.dtype).min)
        return {**inputs, "attention_mask": added, "position_ids": torch.from_numpy(depths).to(self.device)}
