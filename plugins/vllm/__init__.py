"""A plugin for vLLM: Dual Chunk Attention, with the sparse prefill of Qwen2.5-1M.

vLLM calls `registration.register` in each of its processes (entry point group
`vllm.general_plugins`). What computes is free of vLLM: `step_attention`, `decode_rows` and what
they import. See docs/vllm.md.
"""
