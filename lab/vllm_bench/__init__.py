"""vLLM as it is and with the plugin of plugins/vllm: how fast, and whether it finds needles.

    python -m longreach.lab.vllm_bench speed --engine vllm+plugin --tokens 1K,8K,128K,1000000
    python -m longreach.lab.vllm_bench crowd --engine vllm --at-once 48
    python -m longreach.lab.vllm_bench needles --lengths 2K,32K,128K --prompts 20
    python -m longreach.lab.vllm_bench ranks --ranks 1,2

Runs where vLLM is installed; all but `ranks` start it in this process.
"""
