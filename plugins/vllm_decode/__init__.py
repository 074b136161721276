"""vLLM as the engine of a decode worker: a gang prefills into its blocks, and it generates.

`decoder.VllmDecoder` is the engine, behind the contract of `engine.decode.contract`; it knows vLLM
by `core.Core` alone, and so is tested without one. `vllm_core` is vLLM behind that, in this
process, and `connector` what vLLM is told of pages that come from elsewhere. Over several devices
`executor` has further ranks do what it asks of its worker, `follow` is one of them, and `sums` says
how they add up. See docs/vllm.md.
"""
