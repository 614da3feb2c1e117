"""Zero-shot classification: class names, prompts, labelled pictures and scores."""
