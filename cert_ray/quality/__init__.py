"""What a file is worth: its unit-test score, its function score, and the sampling weight made of them."""
