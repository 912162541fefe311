"""`tidal-vllm calibrate`: which layers select, and how much they have to keep.

prompts     what the model is asked: built in, or the user's file
engine      vLLM's engine, set up to be recorded and reconfigured
worker      the part of it inside each worker; `recorder` does the arithmetic
choice      dynamic programming over what was recorded; `baselines` are other rules
state       what survives an interruption; `interrupt` is how one arrives
run         collect, choose, confirm, draw the curve, write the profile
record      what the profile says; `report` is the page to look at
command     the options, and everything refused before any work
"""
