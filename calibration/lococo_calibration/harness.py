"""A model class for lm-evaluation-harness: any cache policy on PyTorch. Needs lm-eval.

from lm_eval import simple_evaluate
from lococo_calibration.harness import LococoLM
lm = LococoLM.load("smollm2-256")
simple_evaluate(lm, tasks=["niah_single_1"], metadata={"pretrained": "smollm2-256", "max_seq_lengths": [4096]})
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lococo_runtime import InvalidArgumentError
from lococo_runtime.llm import load_tokenizer

from lococo_export.checkpoints import load_checkpoint
from lococo_export.reference import ReferenceModel

from .blocks import Fusion, Policy
from .evaluate import PolicySession
from .generate import generate
from .settings import DTYPES, choose_device

MAX_NEW_TOKENS = 256  # where a task names none, as in the harness's own models


class LococoLM(TemplateLM):  # type: ignore[misc]
    """Reads prompts in blocks and generates token by token, greedily, with the cache that a policy leaves.

    Args:
        tokenizer: of the `tokenizers` library.
        eot_token_id: ends a generation, and stands before text without context.
        batch: prompts generated for at once; each as if it were alone.
    """

    def __init__(
        self,
        model: ReferenceModel,
        policy: Policy,
        tokenizer: Any,
        *,
        block_size: int,
        eot_token_id: int,
        batch: int = 8,
    ) -> None:
        super().__init__()
        self.model, self.policy, self.block_size, self.batch = model, policy, block_size, batch
        self._tokenizer, self._eot = tokenizer, eot_token_id

    @classmethod
    def load(cls, checkpoint: str | Path, *, dtype: str = "fp32", device: str = "auto", batch: int = 8) -> LococoLM:
        """The heads of a fitted checkpoint."""
        loaded = load_checkpoint(checkpoint)
        model = ReferenceModel(loaded, DTYPES[dtype], choose_device(device))
        policy = Fusion(loaded.config, model.heads)
        return cls.of(model, policy, loaded.source_dir, loaded.config.block_size, batch)

    @classmethod
    def of(cls, model: ReferenceModel, policy: Policy, source_dir: Path, block_size: int, batch: int = 8) -> LococoLM:
        """Any policy over a model whose tokenizer lies in `source_dir`."""
        eos = model.geometry.eos_token_ids
        if not eos:
            raise InvalidArgumentError(f"{source_dir}: config.json has no eos_token_id, which ends a generation")
        tokenizer = load_tokenizer(source_dir)
        return cls(model, policy, tokenizer, block_size=block_size, eot_token_id=eos[0], batch=batch)

    @property
    def eot_token_id(self) -> int:
        return self._eot

    @property
    def tokenizer_name(self) -> str:
        return "lococo"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids
        return ids

    def _session(self) -> PolicySession:
        return PolicySession(self.model, self.policy, self.block_size)

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        ids = torch.tensor([[*context, *continuation]], device=self.model.device)  # (1, T)
        found, greedy, start = 0.0, True, 0
        for hidden in self._session().forwards(ids[:, :-1]):  # logits of one forward at a time: texts may be long
            skipped = max(0, len(context) - 1 - start)
            wanted = ids[0, start + 1 : start + 1 + hidden.shape[1]][skipped:]
            if len(wanted):
                scores = self.model.lm_head(hidden[0, skipped:]).float().log_softmax(-1)  # (wanted, V)
                found += float(scores.gather(1, wanted[:, None]).sum())
                greedy = greedy and bool((scores.argmax(-1) == wanted).all())
            start += hidden.shape[1]
        return found, greedy

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, which a small cache reads at any length."""
        return [self._score([self._eot], self.tok_encode(request.args[0]))[0] for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [text for first in range(0, len(requests), self.batch)
                for text in self._generate([r.args for r in requests[first : first + self.batch]])]  # fmt: skip

    def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        until: list[list[str]] = []
        for _, options in requests:
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise InvalidArgumentError("generation: expected do_sample false, sampling is not supported here")
            stops = options.get("until") or []
            until.append([stops] if isinstance(stops, str) else [u for u in stops if u])

        def stop(number: int, found: list[int]) -> bool:
            return bool(until[number]) and any(u in self._tokenizer.decode(found) for u in until[number])

        found = generate(
            self.model, self.policy,
            [self.tok_encode(prompt) for prompt, _ in requests],
            [options.get("max_gen_toks", MAX_NEW_TOKENS) for _, options in requests],
            block_size=self.block_size, batch=self.batch, stop=stop,
        )  # fmt: skip
        texts = [self._tokenizer.decode(ids) for ids in found]
        return [
            t[: min((t.index(u) for u in us if u in t), default=len(t))] for t, us in zip(texts, until, strict=True)
        ]
