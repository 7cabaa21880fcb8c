"""Scores of binaural sound: numpy and scipy only, no downloads, nothing learned.

`analysis` transforms one clip once; `spatial` reads its interaural cues, `distances` compares it
with a reference, `onsets` and `alignment` compare it with what is visible; `stats` pools clips;
`evaluate` scores folders of files; `distribution` holds the arithmetic of feature statistics.
"""
