"""Training on DeepSpeed: ZeRO 1 to 3 and offload. Its settings and their rules are in `config/rules/deepspeed.py`."""
