"""What the first minutes on a GPU machine are spent on: `.ci/gpu FOLDER`, step by step in the order of its worth."""
