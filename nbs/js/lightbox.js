// Figures at the full size of the window: a click or the Enter key opens one, Escape or another click closes it.
(() => {
  "use strict";
  const pictures = document.querySelectorAll("figure.nncomp-fig img");
  if (!pictures.length || typeof HTMLDialogElement === "undefined") return;
  const box = document.createElement("dialog");
  box.className = "nn-lightbox";
  box.addEventListener("click", () => box.close());
  document.body.append(box);
  const open = (picture) => {
    const large = new Image(), button = document.createElement("button");
    large.src = picture.src;
    large.alt = picture.alt;
    button.type = "button";
    button.textContent = "Close";
    box.setAttribute("aria-label", "Figure, enlarged");
    box.replaceChildren(large, button);
    box.showModal();
  };
  for (const picture of pictures) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "nn-enlarge";
    button.setAttribute("aria-label", "Enlarge the figure");
    picture.before(button);
    button.append(picture);
    button.addEventListener("click", () => open(picture));
  }
})();
