"""The builder of `data/emoji`: one emoji drawn by several artists, captioned in two languages."""
