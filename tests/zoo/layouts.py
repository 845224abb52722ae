"""Arrangements of folders that people have, and what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path

from tests.zoo.build import Expected, Situation, masks, scans


def lits(folder: Path) -> None:
    scans(folder, "volume-{0,1,2}.nii")
    masks(folder, "segmentation-{0,1,2}.nii")


def lits_in_parts(folder: Path) -> None:
    scans(folder, "volume_pt1/volume-{0,1}.nii", "volume_pt2/volume-{2,3}.nii")
    masks(folder, "segmentations/segmentation-{0,1,2,3}.nii")


def btcv(folder: Path) -> None:
    scans(folder, "img/img{0001,0002}.nii.gz")
    masks(folder, "label/label{0001,0002}.nii.gz")


def btcv_in_one_folder(folder: Path) -> None:
    scans(folder, "img{0001,0002}.nii.gz")
    masks(folder, "label{0001,0002}.nii.gz")


def image_and_label_endings(folder: Path) -> None:
    scans(folder, "{a,b}_image.nii.gz")
    masks(folder, "{a,b}_label.nii.gz")


def ct_and_seg_endings(folder: Path) -> None:
    scans(folder, "{p1,p2}_ct.nii.gz")
    masks(folder, "{p1,p2}_seg.nii.gz")


def scan_and_mask_beginnings(folder: Path) -> None:
    scans(folder, "scan_{001,002}.nii.gz")
    masks(folder, "mask_{001,002}.nii.gz")


def promise12(folder: Path) -> None:
    scans(folder, "Case{00,01}.mha")
    masks(folder, "Case{00,01}_segmentation.mha")


def kits(folder: Path) -> None:
    scans(folder, "case_{00000,00001}/imaging.nii.gz")
    masks(folder, "case_{00000,00001}/segmentation.nii.gz")


def acdc(folder: Path) -> None:
    scans(folder, "patient{001,002}/patient{001,002}_frame{01,12}.nii.gz")
    masks(folder, "patient{001,002}/patient{001,002}_frame{01,12}_gt.nii.gz")


def mnms2(folder: Path) -> None:
    scans(folder, "{001,002}/{001,002}_{SA,LA}_{ED,ES}.nii.gz")
    masks(folder, "{001,002}/{001,002}_{SA,LA}_{ED,ES}_gt.nii.gz")


def mu_glioma_post(folder: Path) -> None:
    name = "PatientID_{0003,0004}/Timepoint_{1,2}/PatientID_{0003,0004}_Timepoint_{1,2}"
    scans(folder, name + "_brain_{t1n,t1c,t2w,t2f}.nii.gz")
    masks(folder, name + "_tumorMask.nii.gz")


def rhuh(folder: Path) -> None:
    scans(folder, "RHUH-{0001,0002}/{0,1}/RHUH-{0001,0002}_{0,1}_{adc,flair,t1,t1ce,t2}.nii.gz")
    masks(folder, "RHUH-{0001,0002}/{0,1}/RHUH-{0001,0002}_{0,1}_segmentations.nii.gz")


def ucsf_pdgm(folder: Path) -> None:
    name = "UCSF-PDGM-{0004,0005}_nifti/UCSF-PDGM-{0004,0005}"
    scans(folder, name + "_{T1,T1c,T2,FLAIR,ADC,DWI,SWI,T1_bias}.nii.gz")
    masks(folder, name + "_{tumor,brain,brain_parenchyma}_segmentation.nii.gz")


def picai(folder: Path) -> None:
    scans(folder, "images/{10000,10001}/{10000,10001}_1000000_{t2w,adc,hbv,sag,cor}.mha")
    masks(folder, "picai_labels/csPCa_lesion_delineations/human_expert/resampled/{10000,10001}_1000000.nii.gz")


def isic(folder: Path) -> None:
    scans(folder, "ISIC2018_Task1-2_Training_Input/ISIC_{0000000,0000001}.jpg")
    masks(folder, "ISIC2018_Task1_Training_GroundTruth/ISIC_{0000000,0000001}_segmentation.png", value=255)


def kvasir(folder: Path) -> None:
    scans(folder, "images/{cju0,cju1}.jpg")
    masks(folder, "masks/{cju0,cju1}.png", value=255)


def clinic_db(folder: Path) -> None:
    scans(folder, "Original/{1,2}.png")
    masks(folder, "Ground Truth/{1,2}.png", value=255)


def drive(folder: Path) -> None:
    scans(folder, "training/images/{21,22}_training.tif")
    masks(folder, "training/1st_manual/{21,22}_manual1.gif", "training/mask/{21,22}_training_mask.gif")


def hrf(folder: Path) -> None:
    scans(folder, "images/{01_dr,01_h}.jpg")
    masks(folder, "manual1/{01_dr,01_h}.tif", "mask/{01_dr,01_h}_mask.tif", value=255)


def folders_for_subsets(folder: Path) -> None:
    scans(folder, "train_images/{a1,a2}.png", "val_images/{b1,b2}.png")
    masks(folder, "train_masks/{a1,a2}.png", "val_masks/{b1,b2}.png")


def wmh(folder: Path) -> None:
    scans(folder, "Utrecht/{0,2}/pre/{FLAIR,T1}.nii.gz")
    masks(folder, "Utrecht/{0,2}/wmh.nii.gz")


def flare(folder: Path) -> None:
    scans(folder, "images/FLARE22_Tr_{0001,0002}_0000.nii.gz")
    masks(folder, "labels/FLARE22_Tr_{0001,0002}.nii.gz")


def amos(folder: Path) -> None:
    scans(folder, "imagesTr/amos_{0001,0004}.nii.gz")
    masks(folder, "labelsTr/amos_{0001,0004}.nii.gz")
    listed = [
        {"image": f"./imagesTr/amos_{n}.nii.gz", "label": f"./labelsTr/amos_{n}.nii.gz"} for n in ("0001", "0004")
    ]
    document = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"}, "training": listed}
    (folder / "dataset.json").write_text(json.dumps(document))


def totalsegmentator(folder: Path) -> None:
    scans(folder, "s{0000,0001}/ct.nii.gz")
    masks(folder, "s{0000,0001}/segmentations/{liver,spleen,vertebrae_L1}.nii.gz")


def a_mask_per_class_beside_the_scan(folder: Path) -> None:
    scans(folder, "case{1,2}_ct.nii.gz")
    masks(folder, "case{1,2}_{liver,spleen}.nii.gz")


def a_folder_per_class(folder: Path) -> None:
    scans(folder, "images/c{1,2}.nii.gz")
    masks(folder, "masks/{liver,spleen}/c{1,2}.nii.gz")


def a_folder_of_classes_per_case(folder: Path) -> None:
    scans(folder, "images/c{1,2}.nii.gz")
    masks(folder, "labels/c{1,2}/{liver,spleen}.nii.gz")


def classes_behind_seg(folder: Path) -> None:
    scans(folder, "c{1,2}.nii.gz")
    masks(folder, "c{1,2}_seg_{liver,spleen}.nii.gz")


def classes_in_the_case_folder(folder: Path) -> None:
    scans(folder, "c{1,2}/ct.nii.gz")
    masks(folder, "c{1,2}/{liver,spleen}.nii.gz")


def a_class_named_like_a_reference(folder: Path) -> None:
    scans(folder, "p{1,2}/CT.nii.gz")
    masks(folder, "p{1,2}/masks/{GTV,heart}.nii.gz")


def names_that_begin_alike(folder: Path) -> None:
    scans(folder, "{anna,anna_2,anna_followup,head_CT,head_CT_Tilt_1,c1 (1)}.nii.gz")


def predictions_beside_scans(folder: Path) -> None:
    scans(folder, "{anna,anna2}.nii.gz")
    masks(folder, "{anna,anna2}_prediction.nii.gz")


def masks_of_an_unknown_word_beside_one_scan_of_several(folder: Path) -> None:
    scans(folder, "{anna,berta,carla,dora}.nii.gz")
    masks(folder, "anna_corrected.nii.gz")


def slices_of_patients(folder: Path) -> None:
    scans(folder, "images/P{01,02}_slice_{003,004}.png")
    masks(folder, "masks/P{01,02}_slice_{003,004}.png")


def pictures_in_folders_of_patients(folder: Path) -> None:
    scans(folder, "images/P{01,02}/{1,2}.png")
    masks(folder, "masks/P{01,02}/{1,2}.png")


def visits(folder: Path) -> None:
    scans(folder, "{anna,berta}_visit{1,2}.nii.gz")
    masks(folder, "{anna,berta}_visit{1,2}_seg.nii.gz")


def visits_with_an_extra_word(folder: Path) -> None:
    scans(folder, "{anna,berta}/visit_{1,2}_rescan/T1.nii.gz")
    masks(folder, "{anna,berta}/visit_{1,2}_rescan/seg.nii.gz")


def numbers_behind_a_patient(folder: Path) -> None:
    scans(folder, "P{01,02}_{003,004}.nii.gz")
    masks(folder, "P{01,02}_{003,004}_seg.nii.gz")


def numbered_cases(folder: Path) -> None:
    scans(folder, "hippocampus_{001,003,004}.nii.gz")
    masks(folder, "hippocampus_{001,003,004}_seg.nii.gz")


def references_of_other_scans(folder: Path) -> None:
    scans(folder, "{anna,berta}.nii.gz")
    masks(folder, "{carla,dora}_seg.nii.gz")


def a_reference_of_another_scan(folder: Path) -> None:
    scans(folder, "{anna,berta}.nii.gz")
    masks(folder, "{anna,carla}_seg.nii.gz")


def a_stranger_in_a_brats_folder(folder: Path) -> None:
    scans(folder, "BraTS2021_{00000,00002}/BraTS2021_{00000,00002}_{t1,t1ce,t2,flair}.nii.gz", "stranger.nii.gz")
    masks(folder, "BraTS2021_{00000,00002}/BraTS2021_{00000,00002}_seg.nii.gz")


def a_folder_per_case(folder: Path) -> None:
    scans(folder, "patient {1,2}/{T1,T1POST,T2,FLAIR}.nii.gz")
    masks(folder, "patient {1,2}/lesions.nii.gz")


def a_folder_per_sequence(folder: Path) -> None:
    scans(folder, "{T1,FLAIR}/{a,b}.nii.gz")


def reference_named_with_its_sequence(folder: Path) -> None:
    scans(folder, "{a,b}_{T1,FLAIR}.nii.gz")
    masks(folder, "{a,b}_T1_seg.nii.gz")


def bids(folder: Path) -> None:
    scans(folder, "sub-{a,b}/ses-{1,2}/anat/sub-{a,b}_ses-{1,2}_{T1w,FLAIR}.nii.gz")
    masks(folder, "derivatives/lesions/sub-{a,b}/ses-{1,2}/anat/sub-{a,b}_ses-{1,2}_dseg.nii.gz")


def upenn(folder: Path) -> None:
    name = "UPENN-GBM-{00001,00002}_11"
    scans(folder, f"images_structural/{name}/{name}_{{T1,T1GD,T2,FLAIR}}.nii.gz")
    masks(folder, f"images_segm/{name}_segm.nii.gz")


def stare(folder: Path) -> None:
    scans(folder, "stare-images/im{0001,0002}.ppm")
    masks(folder, "labels-ah/im{0001,0002}.ah.ppm", value=255)


def spine_generic(folder: Path) -> None:
    scans(folder, "sub-{a,b}/anat/sub-{a,b}_T2w.nii.gz")
    masks(folder, "derivatives/labels/sub-{a,b}/anat/sub-{a,b}_T2w_label-SC_seg.nii.gz")


def isles22(folder: Path) -> None:
    session, name = "sub-strokecase{0001,0002}/ses-0001", "sub-strokecase{0001,0002}_ses-0001"
    scans(folder, f"{session}/dwi/{name}_{{dwi,adc}}.nii.gz")
    scans(folder, f"{session}/anat/{name}_FLAIR.nii.gz", shape=(20, 20, 20))
    masks(folder, f"derivatives/{session}/{name}_msk.nii.gz")


def time_points_t0_and_t1(folder: Path) -> None:
    scans(folder, "Case_{001,002}_T{0,1}.nii.gz")
    masks(folder, "Case_{001,002}_T{0,1}_seg.nii.gz")


def folders_of_time_points_t0_and_t1(folder: Path) -> None:
    scans(folder, "{anna,berta}/T{0,1}/image.nii.gz")
    masks(folder, "{anna,berta}/T{0,1}/seg.nii.gz")


def numbers_behind_numbers(folder: Path) -> None:
    scans(folder, "images/{123,124}_{001,002}.png")
    masks(folder, "masks/{123,124}_{001,002}.png")


def sites_with_patients_with_sessions(folder: Path) -> None:
    scans(folder, "site{1,2}/{001,002}/ses-{01,02}/T1.nii.gz")
    masks(folder, "site{1,2}/{001,002}/ses-{01,02}/seg.nii.gz")


def wmh_with_the_original_scans(folder: Path) -> None:
    scans(folder, "Utrecht/{0,2}/{pre,orig}/{FLAIR,T1}.nii.gz")
    masks(folder, "Utrecht/{0,2}/wmh.nii.gz")


def structures_in_a_folder(folder: Path) -> None:
    scans(folder, "{p1,p2}/img.nrrd")
    masks(folder, "{p1,p2}/structures/{BrainStem,Chiasm}.nrrd")


def masks_of_two_readers(folder: Path) -> None:
    scans(folder, "images/{1,2}.png")
    masks(folder, "1st_manual/{1,2}.png", "2nd_manual/{1,2}.png", value=255)


def idrid(folder: Path) -> None:
    scans(folder, "A. Segmentation/1. Original Images/IDRiD_{01,02}.jpg")
    masks(folder, "A. Segmentation/2. All Segmentation Groundtruths/1. Microaneurysms/IDRiD_{01,02}_MA.tif", value=255)
    masks(folder, "A. Segmentation/2. All Segmentation Groundtruths/2. Haemorrhages/IDRiD_{01,02}_HE.tif", value=255)


def scans_in_a_folder_named_like_one_of_masks(folder: Path) -> None:
    scans(folder, "COVID-19-CT-Seg_20cases/coronacases_{001,002}.nii.gz")
    masks(folder, "{Lung,Infection}_Mask/coronacases_{001,002}.nii.gz")


def references_of_one_image_among_several(folder: Path) -> None:
    scans(folder, "{013,015}/{CTres,SUV}.nii.gz")
    masks(folder, "{013,015}/SEG.nii.gz")


def verse(folder: Path) -> None:
    scans(folder, "rawdata/sub-verse{004,005}/sub-verse{004,005}_ct.nii.gz")
    masks(folder, "derivatives/sub-verse{004,005}/sub-verse{004,005}_seg-vert_msk.nii.gz")


def image_and_mask_joined_to_numbers(folder: Path) -> None:
    scans(folder, "{1,2}Image.png")
    masks(folder, "{1,2}Mask.png", value=255)


def pictures_in_folders_of_sessions(folder: Path) -> None:
    scans(folder, "images/{P01,P02}/{ses-1,ses-2}/{1,2}.png")
    masks(folder, "masks/{P01,P02}/{ses-1,ses-2}/{1,2}.png")


_BRATS = "t1n t1c t2w t2f"
_COLOUR = {"channels": "red green blue", "layout": "folder2d", "classes": "foreground"}

LAYOUTS: tuple[Situation, ...] = (
    (lits, Expected(3, 3, 3, classes="label_1", trains=True)),
    (lits_in_parts, Expected(4, 4, 4, classes="label_1")),
    (btcv, Expected(2, 2, 2, classes="label_1")),
    (btcv_in_one_folder, Expected(2, 2, 2, classes="label_1")),
    (image_and_label_endings, Expected(2, 2, 2, classes="label_1")),
    (ct_and_seg_endings, Expected(2, 2, 2, classes="label_1")),
    (scan_and_mask_beginnings, Expected(2, 2, 2, classes="label_1")),
    (promise12, Expected(2, 2, 2, classes="label_1")),
    (kits, Expected(2, 2, 2, classes="label_1")),
    (acdc, Expected(4, 2, 4, classes="label_1", trains=True)),
    (mnms2, Expected(8, 2, 8, classes="label_1")),
    (mu_glioma_post, Expected(4, 2, 4, channels=_BRATS, classes="label_1")),
    (rhuh, Expected(4, 2, 4, channels=_BRATS, classes="label_1")),
    (ucsf_pdgm, Expected(2, 2, 2, channels=_BRATS, classes="label_1")),
    (picai, Expected(2, 2, 2, channels="t2w", classes="label_1")),
    (isic, Expected(2, 2, 2, **_COLOUR)),
    (kvasir, Expected(2, 2, 2, **_COLOUR)),
    (clinic_db, Expected(2, 2, 2, **_COLOUR)),
    (drive, Expected(2, 2, 2, **_COLOUR)),
    (hrf, Expected(2, 2, 2, **_COLOUR)),
    (folders_for_subsets, Expected(4, 4, 4, **_COLOUR)),
    (wmh, Expected(2, 2, 2, channels="t1n t2f", classes="label_1")),
    (flare, Expected(2, 2, 2, channels="channel_0", classes="label_1", layout="nnunet")),
    (amos, Expected(2, 2, 2, channels="CT", classes="spleen", layout="msd")),
    (totalsegmentator, Expected(2, 2, 2, classes="liver spleen vertebrae_L1", trains=True)),
    (a_mask_per_class_beside_the_scan, Expected(2, 2, 2, classes="liver spleen")),
    (a_folder_per_class, Expected(2, 2, 2, classes="liver spleen")),
    (a_folder_of_classes_per_case, Expected(2, 2, 2, classes="liver spleen")),
    (classes_behind_seg, Expected(2, 2, 2, classes="liver spleen")),
    (classes_in_the_case_folder, Expected(2, 2, 2, classes="liver spleen")),
    (a_class_named_like_a_reference, Expected(2, 2, 2, classes="GTV heart")),
    (names_that_begin_alike, Expected(6, 4)),
    (predictions_beside_scans, Expected(2, 2)),
    (masks_of_an_unknown_word_beside_one_scan_of_several, Expected(4, 4)),
    (slices_of_patients, Expected(4, 2, 4, **_COLOUR)),
    (pictures_in_folders_of_patients, Expected(4, 2, 4, **_COLOUR, trains=True)),
    (visits, Expected(4, 2, 4, classes="label_1")),
    (visits_with_an_extra_word, Expected(4, 2, 4, channels="t1n", classes="label_1")),
    (numbers_behind_a_patient, Expected(4, 2, 4, classes="label_1")),
    (numbered_cases, Expected(3, 3, 3, classes="label_1")),
    (references_of_other_scans, Expected(2, 2, check=1, left_out=2)),
    (a_reference_of_another_scan, Expected(2, 2, 1, classes="label_1")),
    (
        a_stranger_in_a_brats_folder,
        Expected(2, 2, 2, channels=_BRATS, layout="brats2021", classes="NCR ED ET", check=1, left_out=1),
    ),
    (a_folder_per_case, Expected(2, 2, 2, channels=_BRATS, classes="lesions")),
    (a_folder_per_sequence, Expected(2, 2, channels="t1n t2f")),
    (bids, Expected(4, 2, 4, channels="t1n t2f", classes="label_1", layout="bids")),
    (upenn, Expected(2, 2, 2, _BRATS, "NCR ED ET", "upenn")),
    (stare, Expected(2, 2, 2, channels="red green blue", layout="folder2d", classes="ah")),
    (spine_generic, Expected(2, 2, 2, channels="t2w", classes="label_1", layout="bids")),
    (isles22, Expected(2, 2, 2, channels="adc dwi", classes="label_1", layout="bids")),
    (time_points_t0_and_t1, Expected(4, 2, 4, classes="label_1")),
    (folders_of_time_points_t0_and_t1, Expected(4, 2, 4, classes="label_1")),
    (numbers_behind_numbers, Expected(4, 2, 4, **_COLOUR)),
    (sites_with_patients_with_sessions, Expected(8, 4, 8, channels="t1n", classes="label_1")),
    (wmh_with_the_original_scans, Expected(2, 2, 2, channels="t1n t2f", classes="label_1")),
    (structures_in_a_folder, Expected(2, 2, 2, classes="BrainStem Chiasm")),
    (masks_of_two_readers, Expected(2, 2, 2, **_COLOUR)),
    (pictures_in_folders_of_sessions, Expected(8, 2, 8, **_COLOUR)),
    (idrid, Expected(2, 2, 2, channels="red green blue", layout="folder2d", classes="HE MA")),
    (scans_in_a_folder_named_like_one_of_masks, Expected(2, 2, 2, classes="Infection_Mask Lung_Mask")),
    (references_of_one_image_among_several, Expected(4, 2, check=1, left_out=2)),
    (verse, Expected(2, 2, 2, channels="ct", classes="label_1", layout="bids")),
    (image_and_mask_joined_to_numbers, Expected(2, 2, 2, **_COLOUR)),
    (reference_named_with_its_sequence, Expected(2, 2, 2, channels="t1n t2f", classes="label_1")),
)
