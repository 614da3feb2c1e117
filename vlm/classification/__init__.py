"""Zero-shot classification: class names, prompts, labelled pictures, scores and their plot."""
