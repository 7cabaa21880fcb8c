"""The data set for tensorflow-datasets: `tfds build data/binaural_vggsound --manual_dir BUILD`."""
