"""What people ask before they spend GPU hours: `kd-assets preview` and `kd-assets doctor`. No work is submitted."""
