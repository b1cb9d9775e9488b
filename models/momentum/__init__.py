"""MomentumSMoE (arXiv 2410.14574): sparse layers whose outputs are accumulated over depth."""
