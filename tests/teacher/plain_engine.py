"""The engine's interface in its plainest form: one request at a time, everything recomputed for every token.

What `teacher.engine.Engine` must equal, and a stand-in for it where a test wants no batching. Greedy or sampled by the
same `teacher.sampling`; no cache, no text, no log-probabilities.
"""

from __future__ import annotations

import torch

from teacher.model import DeepseekV3
from teacher.requests import Completion, Request
from teacher.sampling import Settings, sample


@torch.inference_mode()
def complete(model: DeepseekV3, request: Request, default_stop: list[int]) -> Completion:
    tokens, stops = list(request.prompt_ids), request.stop_ids if request.stop_ids is not None else default_stop

    def done(reason, stop=None):
        return Completion(request.id, tokens[len(request.prompt_ids) :], reason, stop, len(request.prompt_ids), 0.0)

    for count in range(request.max_tokens):
        logits_1V = model(torch.tensor([tokens])).logits[:, -1]
        one = request.temperature, request.top_p, request.top_k, request.min_p, request.seed
        token = int(sample(logits_1V, Settings(*(torch.tensor([x]) for x in one)), torch.tensor([count])))
        if token in stops:
            return done("stop", token)
        tokens.append(token)
    return done("length")
