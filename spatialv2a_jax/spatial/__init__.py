"""Physics of spatial hearing: spherical harmonics, head-related filters, moving sources."""
