"""Modules: torch.nn names, arguments and state_dict, faster underneath."""
