"""A model as EleutherAI's lm-evaluation-harness sees it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from lazyattn.checkpoint.load import TrainedModel
from lazyattn.data.text_files import check_unicode
from lazyattn.data.tokenizer import Tokenizer
from lazyattn.errors import InputError, require
from lazyattn.eval.generation_settings import Generation, read_settings
from lazyattn.eval.scoring import Scorer
from lazyattn.eval.windows import rolling_windows
from lazyattn.generation.cache import check_context, trained_cache_length
from lazyattn.generation.sampling import SamplingConfig
from lazyattn.generation.text import stream_ids
from lazyattn.model.config import ModelConfig

# A prompt's tokens, and its text unless it was cut.
_Prompt = tuple[list[int], str | None]


class LazyAttentionLM(TemplateLM):
    """Answers the harness's three kinds of request; batches them by length.

    How text is cut into context and continuation is the harness's own
    (`TemplateLM`), so that its other models are asked the same questions.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        *,
        context: int,
        batch_tokens: int = 16_384,
        exact: bool = True,
        add_bos: bool = True,
        seed: int = 0,
    ):
        """Wraps a model.

        Args:
          params: its parameters, laid out on `mesh`.
          config: the model.
          tokenizer: its tokenizer.
          mesh: where it runs.
          context: tokens a prediction may look at; of longer texts the first are left
            out. For `lazy_length_offset`, the length it was trained at.
          batch_tokens, exact: as in `Scorer`.
          add_bos: begin every context with the beginning-of-sequence token, as every
            document of the training data does.
          seed: of the draws, in tasks that sample.

        Raises:
          InputError: for a context or batch_tokens below 1.
        """
        super().__init__()
        require(context >= 1, "context", context, "at least 1")
        self.tokenizer = tokenizer
        self.max_length = context
        self.max_gen_toks = 256
        self.add_bos = add_bos
        self.scorer = Scorer(params, config, mesh, batch_tokens=batch_tokens, exact=exact)
        self._params = params
        self._config = self.scorer.config
        self._mesh = mesh
        self._batch_tokens = batch_tokens
        self._key = jax.random.PRNGKey(seed)

    @classmethod
    def from_trained(
        cls,
        trained: TrainedModel,
        *,
        context: int | None = None,
        beyond_table: bool = False,
        **settings: Any,
    ) -> "LazyAttentionLM":
        """Wraps what `checkpoint.load.load_trained` returns.

        Args:
          trained: the model.
          context: as in `__init__`; None: the length it was trained at.
          beyond_table: allow a context past the end of a bias table without a tail.
          **settings: the rest of `__init__`'s.

        Raises:
          InputError: for a context that the model knows nothing of.
        """
        experiment = trained.experiment
        length = experiment.data.sequence_length
        context = length if context is None else context
        check_context(
            context, experiment.model, length, name="the context", beyond_table=beyond_table
        )
        return cls(
            trained.params,
            experiment.model,
            trained.tokenizer,
            trained.mesh,
            context=context,
            **settings,
        )

    def update(self, params: Mapping[str, Any]) -> None:
        """Puts other parameters of the same model in place; nothing is compiled again."""
        self._params = params
        self.scorer.update(params)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the tokenizer by."""
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the results' `config` says of the model."""
        return {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self._params)),
            "model_dtype": self._config.compute_dtype,
            "max_length": self.max_length,
            "attention": self._config.attention.variant,
            "skip_mass": self._config.attention.skip_mass,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, the first of them `<|bos|>` where that is wanted."""
        bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos_id] * bos + self.tokenizer.encode(string)

    def check(self, requests: Sequence[Instance]) -> None:
        """Checks that every request can be answered.

        Raises:
          InputError: naming the first one that can't be, and why.
        """
        settings: dict[str, str] = {}  # those looked at, and of which request
        for number, request in enumerate(requests):
            where = _called(request, number)
            for text in request.args:
                if isinstance(text, str):
                    check_unicode(text, f"A text in {where}")
            if request.request_type == "loglikelihood":
                self._encode_request(request, where)
            elif request.request_type == "generate_until":
                how = repr(request.args[1])
                if settings.setdefault(how, where) == where:
                    self._how(request.args[1], where)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is greedy.

        A continuation longer than the context is scored in windows, as rolling
        log-likelihoods are.

        Raises:
          InputError: for a continuation that adds no token to its context.
        """
        return self._loglikelihood_tokens(
            [
                (request.args, *self._encode_request(request, _called(request, number)))
                for number, request in enumerate(requests)
            ]
        )

    def _encode_request(self, request: Instance, where: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of both, cut as the harness's own models cut them.

        Raises:
          InputError: if the continuation has no token, so that there is nothing to score.
        """
        context, continuation = request.args
        if context:
            before, new = self._encode_pair(context, continuation)
        else:
            before, new = [], self.tok_encode(continuation, add_special_tokens=False)
        if not new:
            why = "the tokenizer merges it into its context" if continuation else "it is empty"
            raise InputError(
                f"The continuation {continuation!r} of {context[-40:]!r} in {where} has no token to"
                f" score: {why}."
            )
        return before or [self.prefix_token_id], new

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        del unused
        rows: list[list[int]] = []
        parts: list[tuple[int, int]] = []  # for each row its request and the targets counted
        for owner, (_, context, continuation) in enumerate(requests):
            before = max(1, self.max_length + 1 - len(continuation))
            whole = context[-before:] + continuation
            # One window, unless the continuation alone is longer than the context.
            for window in rolling_windows(len(whole), self.max_length, self.max_length):
                rows.append(whole[window.start : window.stop])
                parts.append((owner, min(window.stop - window.first, len(continuation))))
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        scores = self.scorer(rows, context=self.max_length, label="log-likelihoods")
        for (owner, size), score in zip(parts, scores, strict=True):
            totals[owner] -= float(score.nll[-size:].sum(dtype=np.float64))
            greedy[owner] &= bool(score.greedy[-size:].all())
        answers = list(zip(totals, greedy, strict=True))
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, window by window; 0 of an empty one."""
        rows, skipped, owners = [], [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            tokens = [self.prefix_token_id, *self.tokenizer.encode(text)]
            if len(tokens) == 1:
                continue
            for window in rolling_windows(len(tokens), self.max_length, self.max_length):
                rows.append(tokens[window.start : window.stop])
                skipped.append(window.first - window.start - 1)
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self.scorer(rows, context=self.max_length, label="rolling log-likelihoods")
        for owner, skip, score in zip(owners, skipped, scores, strict=True):
            totals[owner] -= float(score.nll[skip:].sum(dtype=np.float64))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns a continuation of each context.

        Contexts are continued in batches of equal settings and similar length.

        Raises:
          InputError: for settings that are not known, or no room for any context.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        how = {
            name: self._how(requests[first].args[1], _called(requests[first], first))
            for name, (first, *_) in groups.items()
        }
        answers = [""] * len(requests)
        for name, members in groups.items():
            sampling, stop, seed = how[name]
            room = self.max_length - sampling.max_new_tokens
            key = self._key if seed is None else jax.random.PRNGKey(seed)
            prompts = {i: self._prompt(requests[i].args[0], room) for i in members}
            members = sorted(members, key=lambda i: -len(prompts[i][0]))
            while members:
                batch, members = self._next_batch(members, prompts, room)
                width = _width(len(prompts[batch[0]][0]), room)
                # The same question asked again is to get another answer.
                draws = jax.random.fold_in(key, len(members))
                texts = self._continue([prompts[i] for i in batch], width, sampling, stop, draws)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _how(self, settings: Mapping[str, Any], where: str) -> Generation:
        """Returns how to draw and where to stop.

        Raises:
          InputError: for settings that are not known, or no room for any context.
        """
        found = read_settings(settings, self.max_gen_toks, where)
        require(
            found.sampling.max_new_tokens < self.max_length,
            f"In {where} the tokens to generate",
            found.sampling.max_new_tokens,
            f"below {self.max_length}, the context",
        )
        return found

    def _prompt(self, text: str, room: int) -> _Prompt:
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        return tokens[-room:], text if len(tokens) <= room else None

    def _next_batch(
        self, members: list[int], prompts: Mapping[int, _Prompt], room: int
    ) -> tuple[list[int], list[int]]:
        rows = self.scorer.rows(_width(len(prompts[members[0]][0]), room))
        return members[:rows], members[rows:]

    def _continue(
        self,
        prompts: list[_Prompt],
        width: int,
        sampling: SamplingConfig,
        stop: Sequence[str],
        key: jax.Array,
    ) -> list[str]:
        # A last batch that isn't full has the shape of the others all the same.
        full = prompts + [prompts[-1]] * (self.scorer.rows(width) - len(prompts))
        with jax.set_mesh(self._mesh), jax.default_matmul_precision(self.scorer.precision):
            texts: list[str] = []
            for texts in stream_ids(  # noqa: B007
                self._params,
                self._config,
                self.tokenizer,
                [tokens for tokens, _ in full],
                texts=[text for _, text in full],
                width=width,
                sampling=sampling,
                key=key,
                stop=stop,
                cache_length=trained_cache_length(self._config, self.max_length)
                or width + sampling.max_new_tokens,
            ):
                pass
        return texts[: len(prompts)]


def _width(tokens: int, room: int) -> int:
    """Returns what a prompt is padded to: a power of two, or all the room there is."""
    return min(room, max(32, 1 << (tokens - 1).bit_length()))


def _called(request: Instance, number: int) -> str:
    """Returns what to call a request: by its task, and its item as the harness counts."""
    if request.task_name is None:
        return f"request {number}"
    return f"item {request.doc_id} of task {request.task_name} (counted from 0)"


def quiet() -> None:
    """Leaves the harness's own log to those who ask for it."""
    for logger in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(logger).setLevel(logging.ERROR)
