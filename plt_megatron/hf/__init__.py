"""PLT for Hugging Face: the model copied into every export, and the conversions."""
