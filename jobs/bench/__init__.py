"""Side-by-side measurements, one file each; `ldm bench …` prints what they return."""
