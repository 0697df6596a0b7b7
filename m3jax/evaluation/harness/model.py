"""lm-evaluation-harness on parameters in memory.

    from lm_eval import simple_evaluate

    model = load_model("merged")
    lm = HarnessModel(model.parameters, model.config, Tokenizer(model.folder))
    simple_evaluate(lm, tasks=["gsm8k"])
    lm.parameters = another_merge  # of the same shapes: compiles nothing

Needs the package `lm_eval`. Tokenises and truncates as its own HFLM does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from m3jax.evaluation.running import continuations, log_likelihoods
from m3jax.evaluation.tasks.answers import until_stop
from m3jax.models.config import Config
from m3jax.models.generation import Sampling
from m3jax.models.layers import Parameters
from m3jax.models.tokenizer import Tokenizer

_MAX_NEW_TOKENS = 256  # HFLM's default


class HarnessModel(TemplateLM):
    """A decoder as the harness's `LM`.

    Attributes:
      parameters: nested dict of arrays; may be replaced between evaluations.
    """

    def __init__(
        self,
        parameters: Parameters,
        config: Config,
        tokenizer: Tokenizer,
        *,
        tokens_per_batch: int = 4096,
        dtype: Any = None,
        key: jax.Array | None = None,
    ):
        """Wraps a model.

        Args:
          parameters, config: of the model.
          tokenizer: of the model.
          tokens_per_batch: padding included; more is faster and takes more memory.
          dtype: of the matrix products; None: the parameters' own.
          key: for tasks that sample; the default is ``jax.random.key(0)``.
        """
        super().__init__()
        self.parameters = parameters
        self.tokenizer = tokenizer.transformers
        self._folder_tokenizer = tokenizer
        self._key = jax.random.key(0) if key is None else key
        self._length = config.max_position_embeddings
        self._options: dict[str, Any] = {
            "config": config,
            "tokens_per_batch": tokens_per_batch,
            "dtype": dtype,
        }

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        return self._folder_tokenizer.first_token

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:  # a chat template may have written it already
            add_special_tokens = not (bos and string.startswith(bos))
        return self._folder_tokenizer.encode(
            string, add_special_tokens=add_special_tokens
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts, completions = [], []
        for _, context, completion in requests:
            room = self._length + 1 - len(completion)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(completion)} tokens; the model takes "
                    f"{self._length}"
                )
            contexts.append(context[-room:])
            completions.append(completion)
        scored = log_likelihoods(
            self.parameters, contexts, completions, **self._options
        )
        return [(score.log_likelihood, score.greedy) for score in scored]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        flat = [(None, *window) for own in windows for window in own]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in own) for own in windows]

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        groups: dict[str, list[int]] = {}  # by settings: those of a task are alike
        for i, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(settings, []).append(i)
        texts = [""] * len(requests)
        for settings, members in groups.items():
            stop, new_tokens, sampling = _settings(json.loads(settings))
            room = self._length - new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={new_tokens} leaves no room for a prompt; the model "
                    f"takes {self._length} tokens"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            written = continuations(
                self.parameters,
                prompts,
                max_new_tokens=new_tokens,
                stop_tokens=self._folder_tokenizer.stop_tokens,
                sampling=sampling,
                key=self._key,
                **self._options,
            )
            for i, tokens in zip(members, written, strict=True):
                text = self._folder_tokenizer.decode(tokens)
                texts[i] = until_stop(text, stop)
        return texts


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """Stop texts, number of tokens and sampling, of a task's generation_kwargs."""
    given = dict(given)
    until = given.pop("until", None) or []
    stop = tuple(
        part for part in ([until] if isinstance(until, str) else until) if part
    )
    limits = [given.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
    temperature = given.pop("temperature", None)
    if not given.pop("do_sample", bool(temperature)):
        temperature = 0.0
    sampling = Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=given.pop("top_k", None) or None,
        top_p=given.pop("top_p", None),
    )
    if given:
        raise ValueError(
            f"generation_kwargs {', '.join(given)}: not supported; known: until, "
            "max_gen_toks, do_sample, temperature, top_k, top_p"
        )
    new_tokens = next((limit for limit in limits if limit), _MAX_NEW_TOKENS)
    return stop, new_tokens, sampling
