"""Dense and sparse configurations on the same prompts, through one running engine."""
