"""One frame of Qwen3-TTS on the GPU or in torch: talker, code predictor, heads, sampling, feedback.

Knows torch, and nothing of text, audio or Pipecat.
"""
