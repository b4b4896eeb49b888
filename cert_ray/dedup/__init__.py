"""Exact and near duplicates at corpus scale, without a shuffle: one survivor per cluster, whatever the order."""
