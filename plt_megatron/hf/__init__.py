"""PLT for Hugging Face: the model code copied into every export, and the conversions."""
