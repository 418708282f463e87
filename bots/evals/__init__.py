"""Pipecat's evals of the voice agent, without a key, a download or a language model as judge."""
