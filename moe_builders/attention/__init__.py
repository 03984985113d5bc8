"""Attention that torchtune lacks; weights and rotary steps keep the Hugging Face layout."""
