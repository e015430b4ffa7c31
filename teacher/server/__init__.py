"""OpenAI's chat and completions endpoints on our engine; `distill teacher serve` starts them.

app.py        routes
calls.py      from a checked body to its reply, whole or streamed
protocol.py   what a body may hold, checked
prompts.py    messages, text and token ids to prompt ids, off the event loop
generate.py   the engine's requests that a body asks for
worker.py     the thread that owns the engine
replies.py    whole replies and streamed chunks
chat.py       where the reasoning ends
logprobs.py   log-probabilities, of a prompt too, as the two endpoints show them
metrics.py    what /metrics says
errors.py     OpenAI's error object
run.py        uvicorn, and a quiet end on SIGTERM
"""
