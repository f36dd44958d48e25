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
from torch import Tensor

from lococo_export.checkpoints import load_checkpoint
from lococo_export.reference import ReferenceModel

from .blocks import Fusion, Policy
from .evaluate import PolicySession
from .settings import DTYPES, choose_device

MAX_NEW_TOKENS = 256  # where a task names none, as in the harness's own models


class LococoLM(TemplateLM):  # type: ignore[misc]
    """Reads prompts in blocks and generates token by token, greedily, with the cache that a policy leaves.

    Args:
        tokenizer: of the `tokenizers` library.
        eot_token_id: ends a generation, and stands before text without context.
    """

    def __init__(
        self, model: ReferenceModel, policy: Policy, tokenizer: Any, *, block_size: int, eot_token_id: int
    ) -> None:
        super().__init__()
        self.model, self.policy, self.block_size = model, policy, block_size
        self._tokenizer, self._eot = tokenizer, eot_token_id

    @classmethod
    def load(cls, checkpoint: str | Path, *, dtype: str = "fp32", device: str = "auto") -> LococoLM:
        """The heads of a fitted checkpoint."""
        loaded = load_checkpoint(checkpoint)
        model = ReferenceModel(loaded, DTYPES[dtype], choose_device(device))
        policy = Fusion(loaded.config, model.heads)
        return cls.of(model, policy, loaded.source_dir, loaded.config.block_size)

    @classmethod
    def of(cls, model: ReferenceModel, policy: Policy, source_dir: Path, block_size: int) -> LococoLM:
        """Any policy over a model whose tokenizer lies in `source_dir`."""
        eos = model.geometry.eos_token_ids
        if not eos:
            raise InvalidArgumentError(f"{source_dir}: config.json has no eos_token_id, which ends a generation")
        return cls(model, policy, load_tokenizer(source_dir), block_size=block_size, eot_token_id=eos[0])

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
        logits = self._session().read(ids[:, :-1])[0, len(context) - 1 :]  # (continuation, V)
        scores, wanted = logits.log_softmax(-1), ids[0, len(context) :]
        found = scores.gather(1, wanted[:, None]).sum()
        return float(found), bool((scores.argmax(-1) == wanted).all())

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [self._score(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, which a small cache reads at any length."""
        return [self._score([self._eot], self.tok_encode(request.args[0]))[0] for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise InvalidArgumentError("generation: expected do_sample false, sampling is not supported here")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [u for u in until if u]
        session = self._session()
        logits = session.read(self._ids(self.tok_encode(prompt)))[:, -1]  # (1, V)
        found: list[int] = []
        text = ""
        for _ in range(options.get("max_gen_toks", MAX_NEW_TOKENS)):
            token = int(logits.argmax())
            if token in self.model.geometry.eos_token_ids:
                break
            found.append(token)
            text = self._tokenizer.decode(found)
            if any(stop in text for stop in until):
                break
            logits = session.read(self._ids([token]))[:, -1]
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)
