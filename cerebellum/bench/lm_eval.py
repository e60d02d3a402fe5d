"""Runs lm-evaluation-harness over llama.cpp: a model class of ours under the harness's own runner.

    cerebellum-lm-eval run --model cerebellum --model_args path=F.gguf --tasks hellaswag

is ``lm_eval`` itself with the class registered. The harness finds models by import alone, so from Python
import ``cerebellum.bench.lm_eval`` and then call ``lm_eval.simple_evaluate(model="cerebellum", ...)``. This
file needs the extra ``lm-eval``, and nothing else in Cerebellum imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:  # pragma: no cover - depends on what is installed
    from cerebellum.errors import BadInput

    raise BadInput(
        f"lm-evaluation-harness is not installed ({missing}): pip install 'cerebellum-gguf[lm-eval]'"
    ) from missing

from cerebellum.bench.chat import render_chat
from cerebellum.bench.stage import examinee_from
from cerebellum.engine.asking import Ask, TokenIds
from cerebellum.errors import BadInput
from cerebellum.llama.asker import open_asker
from cerebellum.llama.native import EngineSettings, LlamaEngine

_DEFAULT_NEW_TOKENS = 256


@register_model("cerebellum")
class CerebellumLM(TemplateLM):  # type: ignore[misc]
    """Is the harness's model class over llama.cpp: loglikelihood, rolling loglikelihood and greedy
    generation.

    Prompts that requests share are decoded once. Arguments of ``--model_args``: path, threads, gpu_layers,
    max_length (in tokens).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        gpu_layers: int = 0,
        max_length: int | None = None,
        **_harness: Any,  # batch_size, device and their kin, which mean nothing here
    ) -> None:
        super().__init__()
        self.examinee = examinee_from(Path(path))
        settings = EngineSettings(threads=int(threads or os.cpu_count() or 1), gpu_layers=int(gpu_layers))
        self._stack = ExitStack()
        self.asker = self._stack.enter_context(open_asker(LlamaEngine(settings), self.examinee.paths))
        self.max_length = int(max_length or self.asker.context_length)

    def close(self) -> None:
        self._stack.close()

    @property
    def eot_token_id(self) -> int:
        eos = self.asker.vocabulary.eos
        if eos is None:
            raise BadInput(f"{self.examinee.name}: the vocabulary has no end-of-text token")
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.asker.vocabulary.bos
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        return _DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return self.examinee.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_harness: Any) -> list[int]:
        """Returns tokens as the model's own tokenizer does: BOS where the model wants one and the text has
        none yet.
        """
        vocabulary = self.asker.vocabulary
        begun = bool(vocabulary.bos_text) and string.startswith(vocabulary.bos_text)
        special = not begun if add_special_tokens is None else add_special_tokens
        return list(self.asker.tokenize(string, add_special=special, parse_special=True))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.asker.vocabulary.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return render_chat(self.asker.vocabulary, chat_history, reply=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_harness: Any,
    ) -> list[tuple[float, bool]]:
        """Answers (log-probability in nats, whether greedy) for each request; one context becomes one ask.

        Each answer goes to the harness's cache as soon as it is there.
        """
        pairs = [_fitted(tuple(c), tuple(e), self.max_length) for _, c, e in requests]
        asks, members = _grouped(pairs)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, reply in self.asker.score(asks):
            for place, scored in zip(members[index], reply.endings, strict=True):
                found[place] = (scored.total, scored.greedy)
                key = requests[place][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[place])
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text in nats, cut into the harness's windows.

        Every token is predicted exactly once.
        """
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [(None, context, ending) for some in windows for context, ending in some]
        scored = iter(self._loglikelihood_tokens(flat))
        totals = [sum(next(scored)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy continuations; a benchmark that samples is refused rather than answered with
        something else.
        """
        found = [""] * len(requests)
        for settings, places in _by_settings(requests).items():
            new_tokens, stops = settings
            room = max(1, self.max_length - new_tokens)
            prompts = [tuple(self.tok_encode(requests[place].args[0])[-room:]) for place in places]
            for index, text in self.asker.generate(prompts, new_tokens, stops):
                found[places[index]] = text
                self.cache_hook.add_partial("generate_until", requests[places[index]].args, text)
        return found


def _fitted(context: TokenIds, ending: TokenIds, max_length: int) -> tuple[TokenIds, TokenIds]:
    """Cuts from the left, as the harness does, so that the ending and what is left of the context fit."""
    ending = ending[-max_length:]
    return context[-max(1, max_length - len(ending) + 1) :], ending


def _grouped(pairs: Sequence[tuple[TokenIds, TokenIds]]) -> tuple[list[Ask], list[list[int]]]:
    """Returns the asks and, for each of them, the places of its endings among the pairs."""
    members: dict[TokenIds, list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        members.setdefault(context, []).append(place)
    asks = [Ask(prompt=c, endings=tuple(pairs[p][1] for p in places)) for c, places in members.items()]
    return asks, list(members.values())


def _by_settings(requests: Sequence[Any]) -> dict[tuple[int, tuple[str, ...]], list[int]]:
    """Groups the places of requests that may be generated together, by (new tokens, stops)."""
    found: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for place, request in enumerate(requests):
        asked = request.args[1]
        if asked.get("do_sample") and float(asked.get("temperature") or 0.0) > 0.0:
            raise BadInput(
                "this task samples (do_sample); Cerebellum generates greedily: --gen_kwargs do_sample=False"
            )
        until = asked.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        new_tokens = int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or _DEFAULT_NEW_TOKENS)
        found.setdefault((new_tokens, stops), []).append(place)
    return found


def main() -> None:
    """Runs ``lm_eval``'s own command line with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
