"""One HTML file for people to look at: pictures, plots, tables and timelines, and how they were made."""

from fdcompile.page.page import Page as Page
from fdcompile.page.timeline import Timeline as Timeline
