"""Sample sets that come with nbkit, each a folder with train.jsonl and held_out.jsonl, and what makes them."""
