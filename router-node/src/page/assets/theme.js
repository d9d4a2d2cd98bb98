// Sets the chosen theme before the page is painted. Not a module: those run too late for that.
{
  const theme = localStorage.getItem('sirocco.theme');
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
}
