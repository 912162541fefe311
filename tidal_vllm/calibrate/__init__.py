"""`tidal-vllm calibrate`: which layers select, and how much they have to keep.

command     the run, its exit code and its output
options     the options; `request` checks them against the model before any work
prompts     what the model is asked: built in, or the user's file; `text`: a document
engine      vLLM's engine, set up to be recorded and reconfigured; `trial` forces tokens
worker      the part of the engine inside each worker; `recorder` does the arithmetic
run         the order of the work: record, choose, confirm, draw the curve
answers     what the model is asked in each step of that
candidates  dynamic programming over what was recorded; `baselines` are other rules
confirm     candidates are run until one is sure to hold; `evidence` says what is sure
curve       the settings of `grid` are run, and one is recommended
state       what survives an interruption; `interrupt` is how one arrives
result      what all of these work on and find
record      what the profile says
report      the page to look at; `pictures` draws for it, `summary` says it in lines
"""
