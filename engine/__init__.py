"""One model on one mesh: weights, attention, KV pages, prefill, decode. No Ray, no HTTP."""
