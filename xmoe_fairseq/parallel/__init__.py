"""Expert parallelism in fairseq's training: ranks that hold different experts, and still train one model."""
