"""Running a laid-out model: stages, the executor of one rank's actions, and a step."""
