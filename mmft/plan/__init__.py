"""What a run will need before it starts: `mmft plan`. Read `memory.estimate` first."""
