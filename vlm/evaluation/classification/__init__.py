"""Zero-shot classification: class names, prompts, labelled images and scores."""
