"""The demo: a small GPT learns real text through unmodified megatron-core, with FORGE or without.

``python -m forge_train.demo --help`` tells what it can do.
"""
