"""From raw text to resumable batches: tokenizers, preprocessing, datasets, sampling."""
