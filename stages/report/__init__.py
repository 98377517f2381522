"""The report: claims, statistics, tables, figures and the page, from the records of the other stages."""
