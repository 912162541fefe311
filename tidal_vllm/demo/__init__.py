"""`tidal-vllm demo`: one model, the same long prompts, dense and sparse in turn.

``planted`` asks the planted model, whose answers are known; ``text`` lets a pretrained
model continue a document; ``engines`` holds what both need.
"""
