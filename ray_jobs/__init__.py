"""Builds, additions and rerank fits as resumable jobs, in this process or on Ray; and Ray actors that search an index (fleet.py)."""
