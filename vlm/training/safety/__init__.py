"""What keeps a run from losing or spoiling what it has learnt."""
